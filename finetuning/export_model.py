"""Exports a fine-tuned model as the static graph that quantization and deployment take.

Reads a directory that run_clue.py wrote; writes inference.pdmodel, inference.pdiparams and inference.pdiparams.info
into it, and into its stage.json how far the graph's logits are from the dynamic model's.

    python export_model.py --task_name CLUEWSC2020 --model_path ppminilm-6l-768h/models/CLUEWSC2020/1e-4_32/
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
from common import checkpoints, cli, exporting


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to export")
    cli.add_task_argument(main)
    help = "directory that run_clue.py wrote"
    main.add_argument("--model_path", type=cli.PathArgument, required=True, help=help)
    exporting.add_export_arguments(parser, parser.add_argument_group("other"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    exporting.choose_device(args)
    # While a graph is put beside the model, no other run may replace the model.
    with exporting.locked_model(args.model_path):
        # Compared with the record: task, files, and, if it is given, the type of the model.
        model = checkpoints.load_classifier_for(args, args.model_path, model_type=args.model_type)
        # Real sentences if they are at hand: random tokens would exercise the same operators, but fewer lengths.
        dev_examples = data.read_dev_if_local(data.task_of(model.record), args)
        exporting.export_into(args.model_path, model, dev_examples, args)


if __name__ == "__main__":
    cli.run(main)

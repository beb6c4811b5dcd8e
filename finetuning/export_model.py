"""Exports a fine-tuned model as the static graph that quantization and deployment take.

Reads a directory that run_clue.py wrote; writes inference.pdmodel, inference.pdiparams and inference.pdiparams.info
into it, and into its stage.json how far the graph's logits are from the dynamic model's.

    python export_model.py --task_name CLUEWSC2020 --model_path ppminilm-6l-768h/models/CLUEWSC2020/1e-4_32/
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
from common import UserError, checkpoints, cli, exporting, files, modeling, records


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to export")
    cli.add_task_argument(main)
    help = "directory that run_clue.py wrote"
    main.add_argument("--model_path", type=cli.PathArgument, required=True, help=help)
    exporting.add_export_arguments(parser, parser.add_argument_group("other"))
    return parser.parse_args(argv)


def export(args):
    """Puts the graph beside the model. The caller holds the lock of the directory."""
    started = time.time()
    model, tokenizer, record, _ = checkpoints.load_classifier_for(args, args.model_path, model_type=args.model_type)
    # Real sentences if they are at hand: random tokens would exercise the same operators, but fewer lengths.
    dev_examples = data.read_dev_if_local(data.task_of(record), args)
    features, inputs = exporting.parity_inputs(dev_examples, tokenizer, args.max_seq_length)
    expected = modeling.predict(model, features, tokenizer.pad_id)
    with files.empty_directory(os.path.join(args.model_path, ".export")) as directory:
        prefix = os.path.join(directory, "inference")
        # The graph is checked in the engine that will run it.
        export = exporting.export_checked(model, prefix, expected, features, inputs, tokenizer.pad_id, args)
        record["export"] = {**export, "seconds": round(time.time() - started, 1)}
        records.write_record(directory, record)
        # The record comes last. Until then the old one refuses what is half new, also after kill -9.
        for name in (*export["weights"], records.RECORD):
            os.replace(os.path.join(directory, name), os.path.join(args.model_path, name))
    print(
        f"{record['task']}: exported to {os.path.join(args.model_path, 'inference')}.pdmodel, logits within "
        f"{export['parity']['largest_difference']:.1e} of the dynamic model on {inputs}"
    )


def main(argv=None):
    args = parse_args(argv)
    exporting.choose_device(args)
    if not os.path.isdir(args.model_path):
        raise UserError(f"--model_path {args.model_path}: no such directory; a model of stage finetune is needed")
    # Before the model is read: otherwise the graph might be that of a model which is being replaced.
    with files.Lock(args.model_path):
        export(args)


if __name__ == "__main__":
    cli.run(main)

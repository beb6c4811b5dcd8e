"""Exports a fine-tuned model as the static graph that quantization and deployment take.

Reads a directory that run_clue.py wrote; writes inference.pdmodel, inference.pdiparams and inference.pdiparams.info
into it, and into its stage.json how far the graph's logits are from the dynamic model's.

    python export_model.py --task_name CLUEWSC2020 --model_path ppminilm-6l-768h/models/CLUEWSC2020/1e-4_32/
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compat  # noqa: F401  before Paddle

import engine
import exporting
import modeling
import records
import utils


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("what to export")
    main.add_argument("--task_name", required=True, help="the task it was fine-tuned on")
    main.add_argument("--model_path", required=True, help="directory that run_clue.py wrote")
    exporting.add_export_arguments(parser.add_argument_group("other"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    exporting.set_device(args)
    started = time.time()
    if not os.path.isdir(args.model_path):
        raise utils.UserError(f"--model_path {args.model_path}: no such directory; a model of stage finetune is needed")
    with utils.Lock(args.model_path):  # before it is read, or what is written might be of a model that is replaced
        model, tokenizer, record = modeling.load_finished(args.model_path, args.use_faster_tokenizer)
        records.check_task(record, args.task_name, args.model_path, args.model_type)
        length = records.sequence_length(args, record)
        features, inputs = exporting.parity_features(args, record, tokenizer, length)
        with utils.empty_directory(os.path.join(args.model_path, ".export")) as directory:
            prefix = os.path.join(directory, "inference")
            expected = modeling.predict(model, features, tokenizer.pad_id)
            exporting.export_static(model, prefix, args.cls_only)
            found = engine.Engine(prefix).predict(features, pad_id=tokenizer.pad_id)
            parity = exporting.parity(expected, found, inputs, args.parity_tolerance)
            files = sorted(os.listdir(directory))
            record["export"] = {
                "weights": records.hash_files(directory, files),
                "parity": parity,
                "cls_only": args.cls_only,
                "seconds": round(time.time() - started, 1),
                "bytes": os.path.getsize(f"{prefix}.pdiparams"),
            }
            records.write_record(directory, record)
            for name in (*files, records.RECORD):  # the record last: until then the one before refuses what is half new
                os.replace(os.path.join(directory, name), os.path.join(args.model_path, name))
    print(
        f"{record['task']}: exported to {os.path.join(args.model_path, 'inference')}.pdmodel, logits within "
        f"{parity['largest_difference']:.1e} of the dynamic model on {inputs}"
    )


if __name__ == "__main__":
    utils.run(main)

"""Cuts the sub-model of one width out of a pruned supernet and exports it, dynamic and static.

Reads <width>/best_model that prune.py wrote; writes <sub>/model_width_0.75000/ (weights that
supernet.load_sub_model loads again) and the static graph <static_sub_model>.{pdmodel,pdiparams,pdiparams.info}, each
directory with the tokenizer and a stage.json. Both are compared with the supernet at that width first.

    W=pruned_models/CLUEWSC2020/0.75
    python export_model.py --task_name CLUEWSC2020 --model_name_or_path $W/best_model --width_mult 0.75 \\
        --sub_model_output_dir $W/sub --static_sub_model $W/sub_static/float
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compat  # noqa: F401  before Paddle

import engine
import exporting
import modeling
import supernet as dynabert
import records
import utils


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("what to export")
    main.add_argument("--task_name", required=True, help="the task of the model")
    main.add_argument("--model_name_or_path", required=True, help="<width>/best_model that prune.py wrote")
    main.add_argument("--sub_model_output_dir", required=True, help="directory for the dynamic sub-model")
    main.add_argument(
        "--static_sub_model", required=True, help="file prefix for the static graph, e.g. .../sub_static/float"
    )
    main.add_argument("--width_mult", type=float, help="default, and checked: the width that best_model was chosen for")
    other = parser.add_argument_group("other")
    other.add_argument("--depth_mult", type=float, default=1.0, help="only 1.0: depth is not pruned here")
    other.add_argument("--n_gpu", type=int, help="accepted; exporting uses one device")
    exporting.add_export_arguments(other)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    exporting.set_device(args)
    started = time.time()
    if args.depth_mult != 1.0:
        raise utils.UserError(f"--depth_mult {args.depth_mult:g}: only 1.0 is supported, depth is not pruned here")
    model, tokenizer, record = modeling.load_finished(args.model_name_or_path, args.use_faster_tokenizer, "prune")
    records.check_task(record, args.task_name, args.model_name_or_path, args.model_type)
    width = record["model"]["width_mult"]
    if args.width_mult not in (None, width):
        raise utils.UserError(f"--width_mult {args.width_mult:g}: this best_model was chosen for width {width:g}")
    sub_target = os.path.join(args.sub_model_output_dir, f"model_width_{width:.5f}")
    static_target, name = os.path.split(os.path.abspath(args.static_sub_model))
    records.check_replaceable(sub_target, "prune_export", [args.model_name_or_path, static_target])
    records.check_replaceable(static_target, "prune_export", [args.model_name_or_path, sub_target])
    args.max_seq_length = records.sequence_length(args, record)
    features, inputs = exporting.parity_features(args, record, tokenizer, args.max_seq_length)

    common = {name: record[name] for name in ("task", "labels", "data", "params", "flops", "model", "metrics", "notes")}
    common["parent"] = modeling.parent_of(args.model_name_or_path, record)

    def write(directory, hashes, export):
        fields = {**common, "weights": hashes, "export": export}
        records.write_record(directory, records.make_record("prune_export", args, started, **fields))

    with utils.whole_directory(sub_target) as sub, utils.whole_directory(static_target) as directory:
        architecture, model_type = record["model"]["architecture"], record["model"]["model_type"]
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        weights = dynabert.slice_state(weights, width, architecture["num_attention_heads"])
        sub_model = dynabert.build_sub_model(model_type, architecture, width, len(record["labels"]))
        sub_model.set_state_dict(weights)
        supernet = dynabert.make_supernet(model, [width])
        dynabert.set_width(supernet, width)
        expected = modeling.predict(supernet, features, tokenizer.pad_id)
        dynamic = exporting.parity(
            expected, modeling.predict(sub_model, features, tokenizer.pad_id), inputs, args.parity_tolerance
        )
        dynabert.save_sub_model(sub, weights, record, width)
        tokenizer.save(sub)
        hashes = records.hash_files(sub, [modeling.WEIGHTS, dynabert.SUB_CONFIG])
        write(sub, hashes, {"parity": dynamic})

        prefix = os.path.join(directory, name)
        exporting.export_static(sub_model, prefix, args.cls_only)
        found = engine.Engine(prefix).predict(features, pad_id=tokenizer.pad_id)
        static = exporting.parity(expected, found, inputs, args.parity_tolerance)
        hashes = records.hash_files(directory, sorted(os.listdir(directory)))
        tokenizer.save(directory)
        size = os.path.getsize(f"{prefix}.pdiparams")
        write(directory, hashes, {"weights": hashes, "parity": static, "cls_only": args.cls_only, "bytes": size})
    print(
        f"{record['task']}: width {width:g} exported to {args.static_sub_model}.pdmodel, logits within "
        f"{max(static['largest_difference'], dynamic['largest_difference']):.1e} of the supernet on {inputs}"
    )


if __name__ == "__main__":
    utils.run(main)

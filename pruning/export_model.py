"""Cuts the sub-model of one width out of a pruned supernet and exports it, as a dynamic model and as a static graph.

Reads <width>/best_model that prune.py wrote. Writes <sub>/model_width_0.75000/, weights that dynabert.load_sub_model
loads again, and the static graph <static_sub_model>.{pdmodel,pdiparams,pdiparams.info}, each directory with the
tokenizer and a stage.json. Both are first compared with the supernet at that width.

    W=pruned_models/CLUEWSC2020/0.75
    python export_model.py --task_name CLUEWSC2020 --model_name_or_path $W/best_model --width_mult 0.75 \\
        --sub_model_output_dir $W/sub --static_sub_model $W/sub_static/float
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
import dynabert
from common import UserError, checkpoints, cli, exporting, modeling
from common.runs import Run, check_replaceable


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to export")
    cli.add_task_argument(main)
    help = "<width>/best_model that prune.py wrote"
    main.add_argument("--model_name_or_path", type=cli.NameOrPathArgument, required=True, help=help)
    help = "directory for the dynamic sub-model"
    main.add_argument("--sub_model_output_dir", type=cli.PathArgument, required=True, help=help)
    help = "file prefix for the static graph, e.g. .../sub_static/float"
    main.add_argument("--static_sub_model", type=cli.PathArgument, required=True, help=help)
    main.add_argument("--width_mult", type=float, help="default, and checked: the width that best_model was chosen for")
    other = parser.add_argument_group("other")
    other.add_argument("--depth_mult", type=float, default=1.0, help="only 1.0: depth is not pruned here")
    other.add_argument("--n_gpu", type=int, help="accepted; exporting uses one device")
    exporting.add_export_arguments(parser, other)
    args = parser.parse_args(argv)
    if args.depth_mult != 1.0:
        raise UserError(f"--depth_mult {args.depth_mult:g}: only 1.0 is supported, depth is not pruned here")
    return args


def export(args):
    pruned = checkpoints.load_classifier_for(args, args.model_name_or_path, "prune", args.model_type)
    record, pad_id = pruned.record, pruned.tokenizer.pad_id
    width = record["model"]["width_mult"]
    if args.width_mult not in (None, width):
        raise UserError(f"--width_mult {args.width_mult:g}: this best_model was chosen for width {width:g}")
    sub_directory = os.path.join(args.sub_model_output_dir, f"model_width_{width:.5f}")
    static_directory, name = os.path.split(os.path.abspath(args.static_sub_model))
    check_replaceable(sub_directory, "prune_export", [args.model_name_or_path, static_directory])
    check_replaceable(static_directory, "prune_export", [args.model_name_or_path, sub_directory])
    inherited = ("task", "labels", "objective", "params", "flops", "model", "metrics", "notes")
    fields = {field: record[field] for field in inherited}
    run = Run("prune_export", args, pruned.parent, record["data"], noted_by="pruning: ", **fields)

    # The rows and columns of the first heads and neurons, in an ordinary model with narrow layers.
    weights = {name: value.numpy() for name, value in pruned.model.state_dict().items()}
    weights = dynabert.slice_state(weights, width, record["model"]["architecture"]["num_attention_heads"])
    sub_model = dynabert.build_sub_model(record, width)
    sub_model.set_state_dict(weights)

    # What it has to compute is what the supernet, which was trained and scored, computes at this width.
    dev_examples = data.read_dev_if_local(data.task_of(record), args)
    features, inputs = exporting.parity_inputs(dev_examples, pruned.tokenizer, args.max_seq_length)
    supernet = dynabert.make_supernet(pruned.model, [width])
    dynabert.set_width(supernet, width)
    expected = modeling.predict(supernet, features, pad_id)
    found = modeling.predict(sub_model, features, pad_id)
    dynamic = exporting.check_parity(expected, found, inputs, args.parity_tolerance)
    sub_files = [checkpoints.WEIGHTS, dynabert.SUB_CONFIG]
    graph_files = [name + suffix for suffix in exporting.GRAPH_SUFFIXES]
    static = {}
    with run.output(sub_directory, sub_files, export={"parity": dynamic}) as sub:
        dynabert.save_sub_model(sub, weights, record, width)
        pruned.tokenizer.save(sub)
        with run.output(static_directory, graph_files, export=static) as directory:
            # The graph is checked in the engine that will run it.
            prefix = os.path.join(directory, name)
            static.update(exporting.export_checked(sub_model, prefix, expected, features, inputs, pad_id, args))
            pruned.tokenizer.save(directory)
    largest = max(static["parity"]["largest_difference"], dynamic["largest_difference"])
    print(
        f"{record['task']}: width {width:g} exported to {args.static_sub_model}.pdmodel, logits within "
        f"{largest:.1e} of the supernet on {inputs}"
    )


def main(argv=None):
    args = parse_args(argv)
    exporting.choose_device(args)
    export(args)


if __name__ == "__main__":
    cli.run(main)

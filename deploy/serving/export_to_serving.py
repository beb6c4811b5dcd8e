"""Prepares an exported model for Paddle Serving: copies the model and writes the server's and client's configurations.

Reads the directory of an exported fine-tuned, pruned or quantized model. Writes --server_path (model, tokenizer,
stage.json, serving_server_conf.prototxt) and --client_path (serving_client_conf.prototxt). The configurations equal
those of paddle_serving_client's converter, which needs paddle.fluid, removed in Paddle 2.5.

    python export_to_serving.py --dirname ../../quantization/tnews_quant_models/mse4 --model_filename int8.pdmodel \\
        --params_filename int8.pdiparams --server_path serving_server --client_path serving_client
"""

import os
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import protocol
from common import UserError, checkpoints, cli, exporting, files, records

# {data type name in Paddle's framework.proto: Paddle Serving's number for it}
TYPES = {name: i for i, name in enumerate("INT64 FP32 INT32 FP64 INT16 FP16 BF16 UINT8 INT8 BOOL".split())}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--dirname", required=True, help="directory of the exported model")
    parser.add_argument("--model_filename", help="name of its graph (default: the one that stage.json names)")
    parser.add_argument("--params_filename", help="file name of its parameters (default: GRAPH.pdiparams)")
    parser.add_argument("--server_path", default="serving_server", help="directory for the server")
    parser.add_argument("--client_path", default="serving_client", help="directory for the client")
    parser.add_argument("--feed_alias_names", help="comma-separated aliases of the inputs, in the graph's order")
    parser.add_argument("--fetch_alias_names", help="comma-separated aliases of the outputs, in the graph's order")
    parser.add_flag("--show_proto", "only print the description of inputs and outputs, to choose alias names by")
    return parser.parse_args(argv)


def read_variables(path):
    """(inputs, outputs) of a .pdmodel in the graph's order: lists of (name, type, shape without batch and length)."""
    from paddle.base.proto import framework_pb2

    block = exporting.read_program(path).blocks[0]
    variables = {variable.name: exporting.tensor_of(variable) for variable in block.vars}

    def described(kind, side):
        operators = [operator for operator in block.ops if operator.type == kind]
        operators.sort(key=lambda operator: next(a.i for a in operator.attrs if a.name == "col"))
        entries = []
        for operator in operators:
            name = next(slot.arguments[0] for slot in getattr(operator, side) if slot.arguments)
            tensor = variables[name].tensor
            kind_of = framework_pb2.VarType.Type.Name(tensor.data_type)
            entries.append((name, TYPES[kind_of], [size for size in tensor.dims if size >= 0]))
        return entries

    return described("feed", "outputs"), described("fetch", "inputs")


def describe(inputs, outputs, feed_alias_names=None, fetch_alias_names=None):
    """The GeneralModelConfig message of Paddle Serving. Raises: UserError for a wrong number of alias names."""
    from paddle_serving_app.proto import general_model_config_pb2

    config = general_model_config_pb2.GeneralModelConfig()
    for given, option, variables, add, kind in (
        (feed_alias_names, "feed_alias_names", inputs, config.feed_var.add, "feed_type"),
        (fetch_alias_names, "fetch_alias_names", outputs, config.fetch_var.add, "fetch_type"),
    ):
        aliases = given.split(",") if given else [name for name, _, _ in variables]
        if len(aliases) != len(variables):
            names = ", ".join(name for name, _, _ in variables)
            raise UserError(f"--{option} {given}: {len(aliases)} names for {len(variables)} ({names})")
        for alias, (name, number, shape) in zip(aliases, variables):
            entry = add(name=name, alias_name=alias, is_lod_tensor=False, shape=shape)
            setattr(entry, kind, number)
    return config


def write_description(directory, side, config):
    """Writes serving_<side>_conf.prototxt as text, and the same message in binary form as .stream.prototxt."""
    with open(os.path.join(directory, f"serving_{side}_conf.prototxt"), "w", encoding="utf-8") as file:
        file.write(str(config))
    with open(os.path.join(directory, f"serving_{side}_conf.stream.prototxt"), "wb") as file:
        file.write(config.SerializeToString())


def main(argv=None):
    args = parse_args(argv)
    with protocol.needs_paddle_serving():
        import paddle_serving_app  # noqa: F401
    model = os.path.join(args.dirname, args.model_filename) if args.model_filename else args.dirname
    graph = checkpoints.open_graph(model, "--dirname")
    prefix, name, record = graph.prefix, graph.name, graph.record
    if args.params_filename not in (None, f"{name}.pdiparams"):
        raise UserError(f"--params_filename {args.params_filename}: those of {name}.pdmodel are {name}.pdiparams")
    graph_files = records.graph_files(record)
    config = describe(*read_variables(f"{prefix}.pdmodel"), args.feed_alias_names, args.fetch_alias_names)
    if args.show_proto:
        print(config)
        return
    for path in (args.server_path, args.client_path):
        known = {"serving_server_conf.prototxt", "serving_client_conf.prototxt"}
        if os.path.exists(path) and os.listdir(path) and not known & set(os.listdir(path)):
            raise UserError(f"{path}: exists and holds something else; name another directory or remove it")
    paths = [os.path.abspath(path) for path in (args.server_path, args.client_path)]
    if os.path.commonpath(paths) in paths:
        raise UserError(f"--client_path {args.client_path}: must not be --server_path, nor one lie in the other")
    with files.whole_directory(args.server_path) as server, files.whole_directory(args.client_path) as client:
        for file in {*graph_files, "vocab.txt", "tokenizer_config.json", *record["files"], records.RECORD}:
            shutil.copy2(os.path.join(graph.directory, file), server)
        records.check_files(server, record, graph_files)
        write_description(server, "server", config)
        write_description(client, "client", config)
    print(f"{prefix} -> {args.server_path} (server), {args.client_path} (client)")


if __name__ == "__main__":
    cli.run(main)

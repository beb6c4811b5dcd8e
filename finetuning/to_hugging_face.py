"""Writes a fine-tuned or distilled model as a directory that Hugging Face's transformers loads.

Reads a directory that run_clue.py, adopt.py or general_distill.py wrote; writes config.json, model.safetensors,
vocab.txt and tokenizer_config.json. PP-MiniLM is a BERT network and becomes BertForSequenceClassification.

    python to_hugging_face.py --model_path ppminilm-6l-768h/models/TNEWS/5e-5_32 --output_dir tnews-hugging-face
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from common import UserError, checkpoints, cli, files, foreign, modeling, records


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    help = "directory of a fine-tuned or distilled model"
    parser.add_argument("--model_path", type=cli.PathArgument, required=True, help=help)
    cli.add_output_argument(parser, "must not exist, or be empty", required=True)
    return parser.parse_args(argv)


def write(args):
    record = records.read_record(args.model_path, "a fine-tuned or distilled model")
    if record["stage"] not in ("finetune", "distill", "pretrain"):
        raise UserError(f"--model_path {args.model_path}: of stage {record['stage']}; a whole model is needed")
    if os.path.exists(args.output_dir) and (not os.path.isdir(args.output_dir) or os.listdir(args.output_dir)):
        raise UserError(f"--output_dir {args.output_dir}: exists; name another directory or remove it")
    family = record["model"]["model_type"]
    if record["stage"] == "finetune":
        found = checkpoints.load_classifier(args.model_path)
        model, tokenizer, names = found.model, found.tokenizer, record["labels"]
    else:
        start = checkpoints.load_pretrained(args.model_path, 2, family, kind="Model")
        model, tokenizer, names = start.model, start.tokenizer, None
    prefix = f"{model.base_model_prefix}."
    weights = {}
    for name, value in model.state_dict().items():
        weights[name[len(prefix) :] if name.startswith(prefix) else name] = value.numpy()
    with files.whole_directory(args.output_dir) as directory:
        foreign.write(directory, family, weights, modeling.architecture_of(model), tokenizer, names)
    print(f"{args.model_path} -> {args.output_dir}: {'ernie' if family == 'ernie' else 'bert'}, {len(weights)} tensors")


def main(argv=None):
    write(parse_args(argv))


if __name__ == "__main__":
    cli.run(main)

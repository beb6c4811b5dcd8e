"""What run_clue.py does with a model that is fine-tuned already: --do_eval and --do_predict."""

import json

import data
from common import batching, checkpoints, modeling, records, texts


def evaluate(args, directory):
    """--do_eval alone: prints one JSON line with the dev accuracy of a fine-tuned directory."""
    model, tokenizer, record, _ = checkpoints.load_classifier(directory, args.use_faster_tokenizer)
    records.check_task(record, args.task_name, directory)
    dev = data.read_split(data.task_of(record), "dev", args.data_dir, args.max_eval_samples)
    features = batching.convert(dev.examples, tokenizer, records.sequence_length(args, record))
    metrics = modeling.score(model, features, tokenizer.pad_id)
    print(json.dumps({"task": record["task"], **metrics, **dev.describe()}, ensure_ascii=False))


def predict_test(args, directory):
    """--do_predict: writes the predictions of a fine-tuned directory for test.json beside the model."""
    model, tokenizer, record, _ = checkpoints.load_classifier(directory, args.use_faster_tokenizer)
    records.check_task(record, args.task_name, directory)
    test = data.read_split(data.task_of(record), "test", args.data_dir)
    features = batching.convert(test.examples, tokenizer, records.sequence_length(args, record))
    logits = modeling.predict(model, features, tokenizer.pad_id)
    path = texts.write_submission(record["task"], data.record_ids(test), record["labels"], logits, directory)
    print(f"{len(features)} test records -> {path}")

"""What run_clue.py does with a model that is fine-tuned already: --do_eval and --do_predict."""

import json

import data
from common import UserError, batching, checkpoints, modeling, processes, records, reports, texts


def read_split(args, directory, split, max_samples=None):
    """(checkpoints.Classifier of a fine-tuned directory, data.Split, list of batching.Feature)"""
    classifier = checkpoints.load_classifier(directory, args.use_faster_tokenizer)
    records.check_task(classifier.record, args.task_name, directory)
    loaded = data.read_split(data.task_of(classifier.record), split, args.data_dir, max_samples)
    length = records.sequence_length(args, classifier.record)
    return classifier, loaded, batching.convert(loaded.examples, classifier.tokenizer, length)


def check_alone():
    """Raises: UserError if several processes are to do what is the work of one."""
    if processes.world_size() > 1:
        raise UserError("--do_eval or --do_predict alone take one process: run them without paddle.distributed.launch")


def evaluate(args, directory):
    """--do_eval alone: prints one JSON line with the dev metrics of a fine-tuned directory; --report writes more."""
    classifier, dev, features = read_split(args, directory, "dev", args.max_eval_samples)
    logits = modeling.predict(classifier.model, features, classifier.tokenizer.pad_id)
    metrics = classifier.objective.metrics(logits, batching.targets(features))
    print(json.dumps({"task": classifier.record["task"], **metrics, **dev.describe()}, ensure_ascii=False))
    if args.report:
        length = records.sequence_length(args, classifier.record)
        answered = [(directory, classifier.record, "fp32", length, logits)]
        reports.write(args.report, answered, dev.describe(), dev.examples, args.report_errors)


def predict_test(args, directory):
    """--do_predict: writes the predictions of a fine-tuned directory for test.json beside the model."""
    classifier, test, features = read_split(args, directory, "test")
    logits = modeling.predict(classifier.model, features, classifier.tokenizer.pad_id)
    path = texts.write_submission(data.task_of(classifier.record), test.record_ids(), logits, directory)
    print(f"{len(features)} test records -> {path}")

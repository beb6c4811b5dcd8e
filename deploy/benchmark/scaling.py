"""Compares one training process with two of half the batch each, on the CPU: the same joint batches on the same cores.

    python scaling.py

Runs run_clue.py and general_distill.py alternately, as one process, and as two that paddle.distributed.launch starts,
which share the cores. Weights and texts are random, which does not affect the speed. Also counts what the two send to
each other per step. Writes scaling.json to --output_dir.
"""

import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import numpy as np
from common import ROOT, UserError, cli, files, modeling, records, tokenization
from tqdm import tqdm

UNTIMED_STEPS = 3  # the first ones also allocate memory
CHARACTERS = [chr(code) for code in range(0x4E00, 0x9FFF + 1)]  # as many as PP-MiniLM's vocabulary, within 1 %
PROCESSES = (1, 2)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    help = "architectures to fine-tune, the first one is also the student of the distillation"
    configs = [os.path.join("..", "..", "configs", f"{name}.json") for name in ("ppminilm-6l-768h", "small-4l-256h")]
    parser.add_argument("--configs", nargs="+", default=configs, help=help)
    parser.add_argument("--teacher_layers", type=int, default=12, positive=True, help="layers of the teacher")
    parser.add_argument("--joint_batch", type=int, default=32, positive=True, help="records of a step")
    parser.add_argument("--steps", type=int, default=12, positive=True, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, positive=True, help="runs of each kind")
    parser.add_argument("--output_dir", default=".", help="directory for scaling.json")
    args = parser.parse_args(argv)
    if args.joint_batch % 2:
        raise UserError(f"--joint_batch {args.joint_batch}: two processes share it, so it must be even")
    return args


def make_inputs(directory, args):
    """Writes vocabulary, texts of 10 to 40 characters as a task and as a corpus, and a teacher."""
    from common.compat import paddle

    rng, path = random.Random(0), lambda name: os.path.join(directory, name)
    sentences = ["".join(rng.choices(CHARACTERS, k=rng.randint(10, 40))) for _ in range(4000)]
    vocabulary = ["[PAD]", *(token for token in tokenization.SPECIAL_TOKENS if token != "[PAD]"), *CHARACTERS]
    files.write_whole(path("vocab.txt"), "\n".join(vocabulary) + "\n")
    for name in ("task", "corpus", "teacher"):
        os.mkdir(path(name))
    rows = [{"sentence": sentence, "label": str(number % 15)} for number, sentence in enumerate(sentences)]
    files.write_json_lines(path("task/train.json"), rows)
    files.write_json_lines(path("task/dev.json"), rows[:32])
    files.write_whole(path("corpus/0.txt"), "\n".join(sentences))
    cls = modeling.model_class("roberta", "Model")
    paddle.seed(0)
    teacher = cls(cls.config_class(vocab_size=len(vocabulary), num_hidden_layers=args.teacher_layers))
    teacher.save_pretrained(path("teacher"))
    shutil.copy(path("vocab.txt"), path("teacher"))


def commands_of(directory, args):
    """{title: words of a training, without batch size and output}"""
    path, steps = lambda name: os.path.join(directory, name), UNTIMED_STEPS + args.steps
    loop = ["--max_steps", str(steps), "--save_steps", str(steps), "--logging_steps", "1", "--device", "cpu"]
    found = {}
    for config in args.configs:
        title = f"fine-tuning, {os.path.splitext(os.path.basename(config))[0]}"
        data = ["--task_name", "task", "--data_dir", directory, "--vocab_file", path("vocab.txt")]
        script = os.path.join(ROOT, "finetuning", "run_clue.py")
        found[title] = [script, *data, "--init_config", config, *loop]
    models = ["--teacher_model_name_or_path", path("teacher"), "--init_config", args.configs[0]]
    student = files.read_json_object(args.configs[0])
    layers = {"teacher_layer_index": args.teacher_layers - 1, "student_layer_index": student["num_hidden_layers"] - 1}
    # 48 relation heads for a teacher of 768 columns, as published, or as many as also divide the student's width.
    layers["num_relation_heads"] = math.gcd(48, student["hidden_size"])
    relations = [word for name, value in layers.items() for word in (f"--{name}", str(value))]
    script = os.path.join(ROOT, "general_distill", "general_distill.py")
    found["distillation to the first"] = [
        script, *models, *relations, "--beta", "1", "--input_dir", path("corpus"), *loop,
    ]  # fmt: skip
    return found


def bytes_sent():
    """What this machine has sent to itself so far: the counter of the loopback device."""
    with open("/proc/net/dev") as file:
        line = next(line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def run(words, processes, args, directory):
    """(seconds of a step, the median; bytes sent per step) of a training."""
    output, logs = os.path.join(directory, "output"), os.path.join(directory, "logs")
    for left in (output, f"{output}.unfinished", logs):
        shutil.rmtree(left, ignore_errors=True)
    os.mkdir(logs)
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", logs]
    batch = ["--batch_size", str(args.joint_batch // processes), "--output_dir", output]
    log = os.path.join(logs, "workerlog.0" if processes > 1 else "log")
    # Without --save_steps in between there is nothing but steps: no evaluation, no checkpoint before the last one.
    command = [sys.executable, *(launch if processes > 1 else ["-u"]), *words, *batch]
    with open(os.path.join(logs, "log"), "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    times, sent = [], []
    while process.poll() is None and len(times) < UNTIMED_STEPS + args.steps:
        time.sleep(0.002)
        if os.path.isfile(log):
            with open(log, encoding="utf-8", errors="replace") as file:
                steps = len(re.findall(r"^step \d+/\d+ loss", file.read(), re.M))
            while len(times) < steps:
                times.append(time.perf_counter())
                sent.append(bytes_sent())
    if process.wait():
        with open(log, encoding="utf-8", errors="replace") as file:
            print(file.read(), file=sys.stderr)
        raise UserError(f"{' '.join(command)}: ended with status {process.returncode}, see above")
    timed = slice(UNTIMED_STEPS - 1, None)
    return float(np.median(np.diff(times[timed]))), float(np.median(np.diff(sent[timed])))


def report(measured, args):
    """Prints the table. Returns: its rows; ``speed`` is the median of the rounds beside one process."""
    rows = []
    print("training | processes | records/s | speed beside one | range of the rounds | MB sent per step, all together")
    print("--- | --- | --- | --- | --- | ---")
    for title, of_processes in measured.items():
        for processes, found in of_processes.items():
            seconds, sent = np.array(found).T
            ratios = np.array(of_processes[1]).T[0] / seconds
            rate, megabytes = args.joint_batch / float(np.median(seconds)), float(np.median(sent)) / 1e6
            speed, low, high = (round(float(figure), 3) for figure in (np.median(ratios), ratios.min(), ratios.max()))
            print(f"{title} | {processes} | {rate:.1f} | {speed:.2f} | {low:.2f}-{high:.2f} | {megabytes:.1f}")
            row = {"training": title, "processes": processes, "records_per_second": round(rate, 2), "speed": speed}
            rows.append({**row, "range": [low, high], "megabytes_per_step": round(megabytes, 2)})
    return rows


def main(argv=None):
    args = parse_args(argv)
    for config in args.configs:
        if not os.path.isfile(config):
            raise UserError(f"--configs {config}: no such file")
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(directory, args)
        trainings = commands_of(directory, args)
        measured = {title: {number: [] for number in PROCESSES} for title in trainings}
        with tqdm(total=args.rounds * len(trainings) * len(PROCESSES), file=sys.stderr) as bar:
            for turn in range(args.rounds):
                for title, words in trainings.items():
                    for number in PROCESSES[:: -1 if turn % 2 else 1]:  # alternates, so that a drift favours none
                        bar.set_description(f"round {turn + 1}, {title}, {number}")
                        measured[title][number].append(run(words, number, args, directory))
                        bar.update()
    rows, machine = report(measured, args), records.describe_machine()
    note = f"random weights and texts; {args.joint_batch} records a step; median of {args.steps} steps, "
    note += f"{args.rounds} rounds; {machine['cpu']}, {machine['cores']} cores"
    print(f"\n- {note}")
    result = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine, "notes": [note], "rows": rows}
    files.write_json(os.path.join(args.output_dir, "scaling.json"), result)


if __name__ == "__main__":
    cli.run(main)

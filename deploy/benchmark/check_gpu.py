"""Checks on a GPU what this project could not run for want of one, and writes the report gpu.json.

    bash ../python/check_gpu.sh                # on a machine with a GPU; without one it ends with one line
    DEVICE=cpu bash ../python/check_gpu.sh     # a rehearsal: the same steps on the CPU

Runs the demo's chain on the GPU; compares TensorRT in FP32, FP16 and INT8 with the CPU, mixed precision with FP32, and
two processes with one; measures the speed table. A step that fails does not stop the others; its log says why. The
same command again goes on with the demo where it was, and does the other steps anew.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from typing import Callable, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import numpy as np
from common import ROOT, UserError, cli, files, gpu, objectives, records

OUTPUT = os.path.join(ROOT, "deploy", "python", "gpu_check")  # beside check_gpu.sh
FLOAT = "pruned_models/TNEWS/0.75/sub_static/float"  # graphs of the demo, pruned to 3/4 of the width
INT8 = "tnews_quant_models/mse4/int8"
# Smallest accepted share of dev records with the same prediction as on the CPU. In FP32 only near-ties may differ; in
# FP16 and BF16 those whose two best logits are closer than the rounding; in INT8 the engines round in every layer.
LEAST_AGREEMENT = {"fp32": 0.998, "fp16": 0.99, "bf16": 0.99, "int8": 0.95}
LARGEST_LOSS = 0.01  # largest accepted loss of accuracy
OBJECTIVE = objectives.Classification()  # of the demo's first task
# Largest accepted relative difference of the distillation loss after 40 steps: mixed precision from FP32, and two
# processes from one that accumulates, as each process draws its own dropout.
LARGEST_DIFFERENCE = {"amp": 0.02, "processes": 0.05}


class Failed(Exception):
    """A check that did not pass; its text says why."""


class Skipped(Exception):
    """A check that cannot be done here; its text says why."""


class Check(NamedTuple):
    title: str
    run: Callable  # (Checker) -> {name: figure}; raises Failed or Skipped


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_device_argument(parser)
    help = "directory of the report gpu.json, of the logs and of the models"
    parser.add_argument("--output_dir", type=cli.PathArgument, default=OUTPUT, help=help)
    help = "training steps of the demo's teacher; fewer are faster, and the models worse"
    parser.add_argument("--demo_steps", type=int, default=600, help=help, positive=True)
    return parser.parse_args(argv)


class Checker:
    """Runs commands for the checks. Attributes: device: gpu or cpu; chain: where the demo's models lie."""

    def __init__(self, args, device):
        self.device, self.demo_steps = device, str(args.demo_steps)
        self.directory = os.path.abspath(args.output_dir)
        self.chain = os.path.join(self.directory, "demo")

    def run(self, name, command, **variables):
        """Runs a command, its output in NAME.log. Raises: Failed with the last line of the log."""
        path = os.path.join(self.directory, f"{name}.log")
        environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": self.device, **variables}
        with open(path, "wb") as log:
            done = subprocess.run(command, env=environment, cwd=self.directory, stdout=log, stderr=log)
        if done.returncode:
            with open(path, encoding="utf-8", errors="replace") as log:
                last = ([line.strip() for line in log if line.strip()] or ["no output"])[-1]
            raise Failed(f"status {done.returncode}, {os.path.relpath(path, self.directory)}: {last[:200]}")

    def python(self, name, script, *arguments, launch=(), **variables):
        self.run(name, [sys.executable, *launch, os.path.join(ROOT, script), *map(str, arguments)], **variables)

    def logits(self, graph, device, precision):
        """float32 [records, labels] and accuracy of one of the demo's graphs on dev, in a process of its own."""
        name = f"{os.path.basename(graph)}_{device}_{precision}"
        file = os.path.join(self.directory, f"{name}.npy")
        use_trt = [] if device == "cpu" else ["--use_trt"]
        self.python(
            name,
            "deploy/python/infer.py",
            *("--model_path", os.path.join(self.chain, graph), "--data_dir", os.path.join(self.chain, "data")),
            *("--device", device, "--precision", precision, "--save_logits", file, *use_trt),
        )
        with open(os.path.join(self.directory, f"{name}.log"), encoding="utf-8") as log:
            result = json.loads(next(line for line in log if line.startswith("{")))
        return np.load(file), result[OBJECTIVE.metric]

    def distill(self, name, *arguments, launch=(), **variables):
        """The last loss of 40 steps of the demo's general distillation."""
        output = os.path.join(self.directory, name)
        shutil.rmtree(output, ignore_errors=True)
        self.python(
            name,
            "general_distill/general_distill.py",
            *("--input_dir", os.path.join(self.chain, "data", "corpus"), "--output_dir", output),
            *("--init_config", os.path.join(ROOT, "configs", "student-2l-128h.json"), "--student_layer_index", 1),
            *("--teacher_model_name_or_path", os.path.join(self.chain, "teacher"), "--teacher_layer_index", 1),
            *("--num_relation_heads", 8, "--max_seq_length", 64, "--learning_rate", 3e-3, "--max_steps", 40),
            *("--save_steps", 40, "--logging_steps", 10, "--device", self.device, *arguments),
            launch=launch,
            **variables,
        )
        losses = records.read_record(os.path.join(output, "model_40")).get("losses")
        if not losses[-1][1] < losses[0][1]:
            raise Failed(f"the loss does not fall: {losses}")
        return losses[-1][1]

    def need(self, path):
        """Raises: Skipped if the demo has not written a path."""
        if not os.path.exists(os.path.join(self.chain, path)):
            raise Skipped(f"the demo has not written {path}")


def check_machine(checker):
    """The GPU, its driver and TensorRT, as every script shows them before it loads anything."""
    if checker.device == "cpu":
        raise Skipped("a rehearsal on the CPU")
    lines = gpu.describe(0)
    if not any(gpu.tensorrt_version()):
        raise Failed(lines[-1])
    return dict(line.split(": ", 1) for line in lines)


def check_demo(checker):
    """Every stage of the pipeline, from generated data to an answer of the service."""
    variables = {"DEMO_OUTPUT": checker.chain, "DEMO_STEPS": checker.demo_steps}
    checker.run("demo", ["bash", os.path.join(ROOT, "demo", "run.sh"), "--task", "tnews"], **variables)
    answers = os.path.join(checker.chain, "answer.json")
    with open(answers, encoding="utf-8") as file:
        return {"the service's answer": json.loads(file.readline())["label"]}


def check_precision(checker, graph, precision):
    """The GPU's logits and accuracy in a precision against the CPU's: of FP16 against FP32, of INT8 against INT8."""
    checker.need(f"{graph}.pdmodel")
    if checker.device == "cpu" and precision == "fp16":
        precision = "bf16"  # what a CPU computes in half the bits
    expected, accuracy = checker.logits(graph, "cpu", "int8" if precision == "int8" else "fp32")
    found, other = checker.logits(graph, checker.device, precision)
    agreement = OBJECTIVE.agreement(found, expected)
    figures = {
        "records": len(expected),
        "largest difference of a logit": round(float(np.abs(found - expected).max()), 5),
        "largest logit": round(float(np.abs(expected).max()), 3),
        "same prediction": round(agreement, 4),
        "accuracy": other,
        "accuracy on the CPU": accuracy,
    }
    if agreement < LEAST_AGREEMENT[precision] or other < accuracy - LARGEST_LOSS:
        raise Failed(shown(figures))
    return figures


def check_amp(checker):
    """Distillation in mixed precision (AMP) against FP32: the same steps from the same weights."""
    checker.need("teacher/stage.json")
    if checker.device == "cpu":
        raise Skipped("needs a GPU")
    return compare_losses(checker.distill("fp32"), checker.distill("amp", "--use_amp"), "amp")


def check_processes(checker):
    """Distillation in two processes, a GPU each, against one process that accumulates two batches."""
    from common.compat import paddle

    checker.need("teacher/stage.json")
    if checker.device != "cpu" and paddle.device.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    one = checker.distill("one_process", "--batch_size", 16, "--gradient_accumulation_steps", 2)
    launch = "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "two_processes_logs"
    backend = {"PADDLE_DISTRI_BACKEND": "gloo"} if checker.device == "cpu" else {}
    two = checker.distill("two_processes", "--batch_size", 16, launch=launch, **backend)
    return compare_losses(one, two, "processes")


def compare_losses(expected, found, name):
    figures = {"loss": found, "expected loss": expected}
    if not abs(found - expected) <= LARGEST_DIFFERENCE[name] * expected:
        raise Failed(shown(figures))
    return figures


def check_speed(checker):
    """The short speed table; its rows go into the report."""
    output = os.path.join(checker.directory, "perf")
    checker.python("perf", "deploy/benchmark/perf.py", "--short", "--device", checker.device, "--output_dir", output)
    with open(os.path.join(output, "perf.json"), encoding="utf-8") as file:
        return {row["title"]: row["speedup"] for row in json.load(file)["rows"]}


CHECKS = (
    Check("GPU, driver, TensorRT", check_machine),
    Check("every stage (the demo)", check_demo),
    Check("TensorRT FP32 against the CPU", lambda checker: check_precision(checker, FLOAT, "fp32")),
    Check("TensorRT FP16 against the CPU's FP32", lambda checker: check_precision(checker, FLOAT, "fp16")),
    Check("TensorRT INT8 against the CPU's INT8", lambda checker: check_precision(checker, INT8, "int8")),
    Check("distillation with AMP against FP32", check_amp),
    Check("two processes against one", check_processes),
    Check("speed table (speed-up)", check_speed),
)


def shown(figures):
    if "why" in figures:
        return figures["why"]
    return "; ".join(f"{name} {figure}" for name, figure in figures.items())


def main(argv=None):
    args = parse_args(argv)
    try:
        device = cli.set_device(args.device or "gpu")
    except UserError as error:
        raise UserError(f"{error} (DEVICE=cpu rehearses the check)") from None
    if ":" in device:  # the launchers of the demo choose by this variable
        raise UserError(f"--device {device}: set CUDA_VISIBLE_DEVICES={device.partition(':')[2]} and give gpu")
    os.makedirs(args.output_dir, exist_ok=True)
    checker, found = Checker(args, device), []
    for number, check in enumerate(CHECKS, 1):
        print(f"{number}/{len(CHECKS)} {check.title} ...", flush=True)
        started = time.monotonic()
        try:
            result, figures = "passed", check.run(checker)
        except (Failed, Skipped) as reason:
            result, figures = type(reason).__name__.lower(), {"why": str(reason)}
        except Exception as error:  # whatever it is, the other checks and the report go on
            result, figures = "failed", {"why": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - started, 1)
        print(f"{number}/{len(CHECKS)} {check.title}: {result}, {seconds:.0f} s", flush=True)
        found.append({"check": check.title, "result": result, "seconds": seconds, "figures": figures})
    note = f"{device}: a small model on generated data; the figures show that it works, and say nothing about CLUE."
    print("\n| check | result | figures |\n| --- | --- | --- |")
    for row in found:
        print(f"| {row['check']} | {row['result']} | {shown(row['figures'])} |")
    print(f"\n{note}")
    report = os.path.join(args.output_dir, "gpu.json")
    machine = {"device": device, "rehearsal": device == "cpu", "machine": records.describe_machine()}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    versions = records.describe_versions()
    files.write_json(report, {"date": date, **machine, "versions": versions, "note": note, "checks": found})
    print(f"report: {files.relative(report)}; please send it in as results/gpu.json")
    if any(row["result"] == "failed" for row in found):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)

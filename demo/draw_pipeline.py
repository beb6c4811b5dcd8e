"""Draws the flow chart of the pipeline, pp-minilm.png: inputs, outputs, tools and results of each stage.

The results are the published ones (PaddleNLP, T4; README, "Published"). Coordinates are pixels at a width of 950.

    python draw_pipeline.py --output ../pp-minilm.png
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from common import ROOT, cli

# Per stage: title, directory of the scripts, tools, output, published results.
STAGES = [
    ("General distillation", "general_distill/", "MiniLMv2 relations", "pretrain/model_{step}/", "59.7 M parameters"),
    ("Fine-tuning, grid search", "finetuning/", "PaddleNLP", "models/TASK/LR_BATCH/", "CLUE 73.69\nBERT-base 72.78"),
    ("Width pruning", "pruning/", "PaddleSlim OFA, DynaBERT", "pruned_models/TASK/0.75/", "CLUE 73.44\n49.1 M, 2.74x"),
    (
        "Quantization",
        "quantization/",
        "PaddleSlim, static INT8",
        "TASK_quant_models/mse4/",
        "CLUE 73.40\n8.88x BERT-base",
    ),
    ("Inference", "deploy/python/", "oneDNN on CPU, TensorRT on GPU", "accuracy, predictions, speed", ""),
    ("Serving", "deploy/serving/", "Paddle Serving pipeline", "HTTP 18083, RPC 8091", ""),
]
FIRST_READS = "teacher: RoBERTa-wwm-ext-large\ncorpus: text, one sentence a line"
BESIDE = {1: "train.json, dev.json", 3: "4 or 8 train records to calibrate"}


def draw(path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure = pyplot.figure(figsize=(9.5, 6.4), dpi=200)  # drawn at twice the size
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 950), ylim=(640, 0))
    axes.axis("off")

    def box(x, y, width, height, face, edge):
        style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=9", fc=face, ec=edge, lw=1.4)
        axes.add_patch(style)

    def text(x, y, words, size=11, **options):
        axes.text(x, y, words, fontsize=size, va="center", **{"ha": "center", "color": "#1b2733", **options})

    def arrow(start, end, **options):
        style = {"arrowstyle": "-|>", "color": "#51667a", "lw": 1.6, "shrinkA": 0, "shrinkB": 0, **options}
        axes.annotate("", end, start, arrowprops=style)

    for x, words in ((125, "reads"), (405, "stage"), (667, "writes"), (866, "published")):
        text(x, 18, words, 11, color="#51667a", style="italic")
    top, step, height = 38, 100, 76
    for number, (stage, scripts, tools, writes, published) in enumerate(STAGES):
        y, middle = top + number * step, top + number * step + height / 2
        box(285, y, 240, height, "#e3eef9", "#2f6fab")
        text(405, y + 16, stage, 11.5, weight="bold")
        text(405, y + 37, scripts, 10, family="monospace", color="#2f6fab")
        text(405, y + 58, tools, 9.5)
        box(565, middle - 21, 205, 42, "#fdf3e1", "#c98a1b")
        text(667, middle, writes, 9, family="monospace" if "/" in writes else None)
        arrow((525, middle), (565, middle))
        text(866, middle, published, 10)
        if number == 0 or number in BESIDE:
            box(10, middle - 21, 230, 42, "#fdf3e1", "#c98a1b")
            text(125, middle, FIRST_READS if number == 0 else BESIDE[number], 9)
            arrow((240, middle), (285, middle))
        if number < 4:  # the output is the input of the next stage
            arrow((667, middle + 21), (525, y + step + 10), connectionstyle="angle,angleA=-90,angleB=0,rad=8")
    # The service also reads the quantized model.
    start, end = top + 3 * step + height / 2, top + 5 * step + 10
    axes.plot([770, 785, 785, 700], [start, start, end, end], color="#51667a", lw=1.6)
    arrow((701, end), (525, end))
    text(
        125, top + 2 * step + 38, "stage.json beside every output:\narguments, data, parent, metrics", 9, style="italic"
    )
    text(125, top + 4 * step + 38, "every stage but fine-tuning\nmay be left out", 9, style="italic")
    figure.savefig(path, metadata={"Software": None})


def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", default=os.path.join(ROOT, "pp-minilm.png"), help="PNG file to write")
    draw(parser.parse_args(argv).output)


if __name__ == "__main__":
    cli.run(main)

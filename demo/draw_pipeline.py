"""Draws the flow chart of the pipeline: what each stage reads and writes, and the published results of its model.

Writes pp-minilm.png (Chinese) and pp-minilm_en.png (English). The font of both, Noto Sans SC, is a package of its own:

    ../.venv/bin/python -m pip install --require-hashes --no-deps -r ../requirements/draw.txt
    python draw_pipeline.py
"""

import io
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from common import ROOT, UserError, cli
from common.files import write_whole

PICTURES = ("pp-minilm.png", "pp-minilm_en.png")
TEXTS = {  # in the order of PICTURES: Chinese, English
    "reads": ("输入", "reads"),
    "stages": ("阶段与输出", "stages and what they write"),
    "published": ("PaddleNLP 官方结果（T4）", "published by PaddleNLP (T4)"),
    "figures": (("CLUE 平均", "参数量", "加速比"), ("CLUE average", "parameters", "speed-up")),
    "teacher": ("教师 RoBERTa-wwm-ext-large", "teacher RoBERTa-wwm-ext-large"),
    "corpus": ("语料，每行一句", "corpus, one sentence per line"),
    "built-in": ("内置的预训练模型", "built-in pre-trained model"),
    "data": ("任务数据", "data of the task"),
    # Of a stage: its title, then its tools.
    "distillation": ("通用蒸馏\n样本间关系（MiniLMv2）", "General distillation\nMiniLMv2, relations of samples"),
    "fine-tuning": ("微调与网格搜索\nPaddleNLP", "Fine-tuning, grid search\nPaddleNLP"),
    "pruning": ("宽度裁剪\nPaddleSlim OFA、DynaBERT", "Width pruning\nPaddleSlim OFA, DynaBERT"),
    "quantization": (
        "INT8 量化\nPaddleSlim，4 或 8 条校准数据",
        "INT8 quantization\nPaddleSlim, 4 or 8 calibration records",
    ),
    "inference": ("推理\nCPU: oneDNN，GPU: TensorRT", "Inference\nCPU: oneDNN, GPU: TensorRT"),
    "serving": ("服务\nPaddle Serving 流水线", "Serving\nPaddle Serving pipeline"),
    "inference output": ("精度、预测、速度", "accuracy, predictions,\nspeed"),
    "serving output": ("HTTP 18083\nRPC 8091", "HTTP 18083\nRPC 8091"),
    "baseline": ("BERT-base（基线）", "BERT-base (baseline)"),
    "fine-tuned": ("PP-MiniLM（微调）", "PP-MiniLM (fine-tuned)"),
    "pruned": ("PP-MiniLM + 裁剪", "PP-MiniLM + pruning"),
    "quantized": ("PP-MiniLM + 量化（未裁剪）", "PP-MiniLM + quantization (unpruned)"),
    "pruned + quantized": ("PP-MiniLM + 裁剪 + 量化", "PP-MiniLM + pruning + quantization"),
    "notes": (
        "虚线：跳过某个阶段；除微调外，各阶段都可以跳过\n每个输出都附有 stage.json：参数、数据、上游模型、指标",
        "dashed: a stage is skipped; every stage but fine-tuning can be skipped\n"
        "stage.json beside every output: arguments, data, parent model, metrics",
    ),
}
# Stages that write a model: key in TEXTS, directory of the scripts, model.
STAGES = (
    ("distillation", "general_distill/", "pretrain/model_{step}/"),
    ("fine-tuning", "finetuning/", "models/TASK/LR_BATCH/"),
    ("pruning", "pruning/", "pruned_models/TASK/0.75/"),
    ("quantization", "quantization/", "TASK_quant_models/mse4/"),
)
DEPLOYMENT = (("inference", "deploy/python/"), ("serving", "deploy/serving/"))
# README, published results: key in TEXTS, mean accuracy on seven CLUE tasks, parameters, speed relative to BERT-base.
PUBLISHED = (
    ("baseline", "72.78", "102.3 M", "1.00x"),
    ("fine-tuned", "73.69", "59.7 M", "2.15x"),
    ("pruned", "73.44", "49.1 M", "2.74x"),
    ("quantized", "73.28", "59.8 M", "7.34x"),
    ("pruned + quantized", "73.40", "49.2 M", "8.88x"),
)
STAGE, FILES, NOTE = ("#e3eef9", "#2f6fab"), ("#fdf3e1", "#c98a1b"), ("#f3f5f7", "#c3ccd5")  # fill, edge
INK, BLUE, GRAY = "#1b2733", "#1f5a91", "#465a6d"


def register_font():
    """Makes Noto Sans SC known to matplotlib. Returns: its family. Raises: UserError if it is not installed."""
    from matplotlib import font_manager

    try:
        from pylopdf_fonts_zh_cn import sans_path
    except ImportError:
        install = ".venv/bin/python -m pip install --require-hashes --no-deps -r requirements/draw.txt"
        raise UserError(f"the font Noto Sans SC is not installed; with Python 3.10 or later: {install}") from None
    font_manager.fontManager.addfont(str(sans_path()))
    return font_manager.FontProperties(fname=str(sans_path())).get_name()


def draw(path, language):
    """Draws one picture, in units of which 950 are the width.

    Args: path: PNG file to write. language: index into the entries of TEXTS.
    """
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path

    figure = pyplot.figure(figsize=(9.5, 7.95), dpi=200)  # two pixels per unit
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 950), ylim=(795, 0))
    axes.axis("off")
    words = {key: entry[language] for key, entry in TEXTS.items()}

    def box(x, y, width, height, colors):
        style = {"boxstyle": "round,pad=0,rounding_size=8", "fc": colors[0], "ec": colors[1], "lw": 1.4}
        axes.add_patch(FancyBboxPatch((x, y), width, height, **style))

    def text(x, y, string, size=10.5, **options):
        style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.4, **options}
        axes.text(x, y, string, fontsize=size, **style)

    def files(x, y, width, height, string, **options):
        box(x, y, width, height, FILES)
        text(x + width / 2, y + height / 2, string, **options)

    def stage(x, y, width, key, scripts):
        title, tools = words[key].split("\n")
        box(x, y, width, 74, STAGE)
        text(x + width / 2, y + 17, title, 13, color=BLUE)
        text(x + width / 2, y + 38, scripts, family="monospace")
        text(x + width / 2, y + 58, tools)

    def connect(*points, dashed=False):
        """A line through points, along the axes, with round corners and an arrow head at the end of the last one."""
        points = np.array(points, dtype=float)
        steps = np.sign(np.diff(points, axis=0))  # unit vectors
        neck = points[-1] - 8 * steps[-1]  # the line ends here, so that it does not blunt the tip
        vertices, codes = [points[0]], [Path.MOVETO]
        for corner, before, after in zip(points[1:], steps, steps[1:]):
            vertices += [corner - 8 * before, corner, corner + 8 * after]
            codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
        line = Path([*vertices, neck], [*codes, Path.LINETO])
        axes.add_patch(PathPatch(line, fill=False, ec=GRAY, lw=1.6, ls=(0, (4, 2)) if dashed else "-"))
        across = 4.5 * steps[-1][::-1]
        axes.add_patch(Polygon([points[-1], neck + across, neck - across], fc=GRAY, lw=0))

    # The chain of stages and models, from top to bottom.
    left, right, middle = 300, 580, 440
    tops = [46 + 148 * number for number in range(len(STAGES))]
    for top, (key, scripts, model) in zip(tops, STAGES):
        stage(left, top, right - left, key, scripts)
        files(left, top + 94, right - left, 34, model, family="monospace")
        connect((middle, top + 74), (middle, top + 94))
        connect((middle, top + 128), (middle, top + 148))
    distill, tune, prune, quantize = tops
    deploy = quantize + 148
    box(15, deploy, 920, 94, NOTE)  # one frame: either stage takes any of the models that lead to it
    for x, (key, scripts) in zip((25, 485), DEPLOYMENT):
        stage(x, deploy + 10, 240, key, scripts)
        files(x + 270, deploy + 22, 170, 50, words[f"{key} output"])
        connect((x + 240, deploy + 47), (x + 270, deploy + 47))

    # What comes from outside.
    files(15, distill + 12, 244, 50, f"{words['teacher']}\n{words['corpus']}")
    files(15, distill + 94, 244, 34, words["built-in"])
    box(15, tune + 32, 244, 190, FILES)
    text(137, tune + 116, words["data"])
    text(137, tune + 138, "train.json, dev.json", family="monospace")
    for y in (distill + 37, tune + 52, prune + 37):
        connect((259, y), (left, y))

    # Ways around a stage. The one from the pruned model is on the left, where it crosses no other.
    connect((259, distill + 111), (280, distill + 111), (280, tune + 20), (left, tune + 20), dashed=True)
    connect((right, tune + 118), (603, tune + 118), (603, quantize + 37), (right, quantize + 37), dashed=True)
    connect((right, tune + 104), (626, tune + 104), (626, deploy), dashed=True)
    connect((left, prune + 111), (280, prune + 111), (280, deploy), dashed=True)

    # Published results, each beside its model.
    columns = (704, 803, 893)
    for x, name in zip(columns, words["figures"]):
        text(x, 46, name, color=GRAY)
    rows = (distill + 45, tune + 111, prune + 111, quantize + 42, quantize + 111)
    for y, (key, *figures) in zip(rows, PUBLISHED):
        box(650, y - 28, 285, 56, NOTE)
        text(662, y - 12, words[key], ha="left", color=BLUE)
        for x, value in zip(columns, figures):
            text(x, y + 11, value, 11.5)

    for x, key in ((137, "reads"), (middle, "stages"), (793, "published")):
        text(x, 20, words[key], 11.5, color=GRAY)
    text(15, deploy + 127, words["notes"], ha="left")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_whole(path, content.getvalue())
    pyplot.close(figure)


def main(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_output_argument(parser, "directory of the two PNG files (default: the root of the repository)")
    directory = parser.parse_args(argv).output_dir or ROOT

    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"font.family": register_font()}):
        for language, name in enumerate(PICTURES):
            draw(os.path.join(directory, name), language)


if __name__ == "__main__":
    cli.run(main)

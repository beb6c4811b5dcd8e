"""The picture of summarize.py --plot: the metric against the file's size and the speed, the stages of a task linked.

And what all scripts draw with: import_pyplot.
"""

import io
import itertools
import os
from typing import NamedTuple, Optional

from common import UserError, files
from common.objectives import shown
from common.records import descendants, score
from common.tables import metric_of, row_of, size_of

MARKERS = "os^Dvp*XP<>"
HORIZONTAL, VERTICAL = {-1: "right", 0: "center", 1: "left"}, {-1: "top", 0: "center", 1: "bottom"}
# Where a label may stand, seen from its point: distance in 1/72 inch, direction. The first place that is free is taken.
PLACES = [
    (distance, x, y)
    for distance in (7, 16)
    for x, y in ((1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1))
]


class Point(NamedTuple):
    kind: str  # the row of the CLUE table, which has one marker
    color: str  # of the model and its task
    name: str  # of the task, and of the model if there are several
    stage: str  # what was done, such as "pruned to 0.75, INT8 mse4"
    record: dict
    parent: Optional[dict]  # the record among the points that this one was made from
    size: float  # of the file, MB
    speed: Optional[float]  # sentences per second
    speedup: Optional[float]

    @property
    def y(self):
        return score(self.record) * 100


def points_of(families, children):
    """The points of all panels. Args: families: [(model, rows of tables.clue_rows)]."""
    points, colors = [], (f"C{number % 10}" for number in itertools.count())
    for model, rows in families:
        for task in dict.fromkeys(task for row in rows for task in row["cells"]):
            name = task if len(families) == 1 else f"{os.path.basename(model)}, {task}"
            chosen, color = [row for row in rows if task in row["cells"]], next(colors)
            found = [row["cells"][task] for row in chosen]
            for row, record in zip(chosen, found):
                parent = nearest_ancestor(record, found, children)
                stage = row_of(record)[0].replace(", FP32", "")
                figures = (size_of(record) or 0) / 1e6, row["speeds"].get(task), row["speedup"]
                points.append(Point(row["row"], color, name, stage, record, parent, *figures))
    return points


def nearest_ancestor(record, found, children):
    """The last one among the records found from which this one was made, directly or not; None if there is none."""
    lines = [(other, descendants(other, children)) for other in found]
    ancestors = [(len(line), other) for other, line in lines if any(one["path"] == record["path"] for one in line)]
    return min(ancestors, key=lambda pair: pair[0])[1] if ancestors else None


def import_pyplot():
    """matplotlib.pyplot that draws into files only, so that no screen is needed. Imported late: it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(path, families, children):
    """Draws the dev figure of every row against the size of its file, and its speed where that is known.

    Args: families: [(model, rows of tables.clue_rows)]. children: result of records.children_among.
    Raises: UserError if matplotlib cannot write such a file.
    """
    pyplot = import_pyplot()
    points = points_of(families, children)
    panels = [("parameter file, MB", [point.size for point in points])]
    if any(point.speedup for point in points):
        panels.append(("speed-up against BERT-base", [point.speedup for point in points]))
    elif any(point.speed for point in points):
        panels.append(("sentences/s", [point.speed for point in points]))
    size = (6 * len(panels), 4.5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    kind = os.path.splitext(path)[1].lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--plot {path}: its ending must be that of a picture, .png or .svg")
    metrics = " or ".join(dict.fromkeys(shown(metric_of(point.record)) for point in points))
    markers = dict(zip(dict.fromkeys(point.kind for point in points), itertools.cycle(MARKERS)))
    drawn = []
    for axis, (label, values) in zip(axes[0], panels):
        places = [(point, value) for point, value in zip(points, values) if value]
        drawn.append((axis, places))
        for point, x in places:
            axis.scatter(x, point.y, marker=markers[point.kind], color=point.color, zorder=3)
        axis.set_xlabel(label)
        axis.margins(y=0.15)
        axis.set_xlim(0, max((value for _, value in places), default=1) * 1.4)  # room for labels on the right
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"dev {metrics}, %")
    figure.draw_without_rendering()  # now the axes have their places, which labels need
    for axis, places in drawn:
        label_points(axis, places, link_points(axis, places))
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format=kind)
    files.write_whole(path, content.getvalue())


def link_points(axis, places):
    """Draws an arrow from each point's parent to the point, if both are there.

    Args: places: [(point, x)]. Returns: {path of the point's record: (start, end)}.
    """
    position = {point.record["path"]: (x, point.y) for point, x in places}
    arrows = {}
    for point, x in places:
        start = position.get(point.parent["path"]) if point.parent else None
        if start:
            style = {"arrowstyle": "->", "color": point.color, "alpha": 0.6, "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", (x, point.y), start, arrowprops=style)
            arrows[point.record["path"]] = start, (x, point.y)
    return arrows


def label_points(axis, places, arrows):
    """Writes each point's label where it covers no point, arrow or other label. One that has no such place is left out.

    The marker says the stage, too; labels with the name of a task are written first. Args: arrows: of link_points.
    """
    renderer, inside = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    taken = [box_around(axis, (x, point.y), 4) for point, x in places]
    for (x1, y1), (x2, y2) in arrows.values():
        steps = [step / 20 for step in range(21)]
        taken += [box_around(axis, (x1 + step * (x2 - x1), y1 + step * (y2 - y1)), 1) for step in steps]
    for point, x in sorted(places, key=lambda place: place[0].record["path"] in arrows):
        # At the end of an arrow it is clear of what task it is, and what was quantized.
        linked = point.record["path"] in arrows
        label = point.stage.split(", ")[-1] if linked else f"{point.name}, {point.stage}"
        # Without the name of a task, it has to stand beside its point to be understood.
        for distance, right, up in [place for place in PLACES if place[0] == 7 or not linked]:
            text = axis.annotate(
                label, (x, point.y), (right * distance, up * distance), textcoords="offset points", fontsize=8,
                color=point.color, ha=HORIZONTAL[right], va=VERTICAL[up], in_layout=False,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            is_inside = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def box_around(axis, position, pixels):
    """The box of that many pixels in each direction around a position in the coordinates of the data."""
    from matplotlib.transforms import Bbox

    x, y = axis.transData.transform(position)
    return Bbox([[x - pixels, y - pixels], [x + pixels, y + pixels]])

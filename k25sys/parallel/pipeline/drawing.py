"""Drawings of timelines as SVG, without any package."""

from html import escape

from k25sys.errors import ArgumentValueError, message
from k25sys.parallel.pipeline.ir import COMMUNICATION, Kind
from k25sys.parallel.pipeline.timeline import Span, Timeline

_COLOURS = {
    Kind.FORWARD: ("forward", "#4e79a7", "#ffffff"),
    Kind.BACKWARD: ("backward", "#59a14f", "#ffffff"),
    Kind.BACKWARD_INPUT: ("input gradients", "#8cd17d", "#000000"),
    Kind.BACKWARD_WEIGHT: ("weight gradients", "#b6992d", "#ffffff"),
    Kind.VISION_FORWARD: ("vision forward", "#b07aa1", "#ffffff"),
    Kind.VISION_BACKWARD: ("vision backward", "#d4a6c8", "#000000"),
    Kind.DELIVER: ("media to stage 0", "#f28e2b", "#000000"),
    Kind.RETURN: ("media gradients", "#ffbe7d", "#000000"),
}
"""Name in the legend, colour of the box, colour of its text."""
_ROW, _BOX, _MARGIN, _LEGEND = 26, 20, 64, 52


def draw_svg(timeline: Timeline, *, width: int = 1600) -> str:
    """An SVG document: a row for each rank, a box for each action as wide as it takes, idle time left blank.

    A box has the number of its micro-batch where that fits, and tells its action and times when pointed at. It is
    lighter the later its stage is among those of its rank, and palest where it waits (for expert-parallel peers). Lines
    are messages that take time.

    Args:
        width: Pixels of the whole drawing, 200 or more.

    Raises:
        ArgumentValueError: a smaller width.
    """
    if width < 200:
        raise ArgumentValueError(message("draw_svg", "width", width, "200 or more pixels"))
    scale = (width - 2 * _MARGIN) / (timeline.makespan or 1.0)
    bottom = _LEGEND + timeline.num_ranks * _ROW
    title = f"{timeline.name}: {timeline.makespan:.6g} s, bubble {timeline.bubble:.2%}"
    size = f'width="{width}" height="{bottom + 24}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect {size} fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="18" font-size="14">{escape(title)}</text>',
        *_legend(timeline),
    ]
    for rank, spans in enumerate(timeline.spans):
        top = _LEGEND + rank * _ROW
        parts.append(f'<text x="4" y="{top + 14}">rank {rank}</text>')
        stages = sorted({span.action.stage for span in spans})
        for span in spans:
            if span.action.kind not in COMMUNICATION:
                opacity = 1 - 0.5 * stages.index(span.action.stage) / len(stages)
                parts += _box(span, _MARGIN + (span.start - timeline.start) * scale, top, scale, opacity)
    for transfer in timeline.messages:
        if transfer.end > transfer.start:
            begin, end = (_MARGIN + (seconds - timeline.start) * scale for seconds in (transfer.start, transfer.end))
            source, target = (_LEGEND + rank * _ROW + _BOX / 2 for rank in (transfer.source, transfer.target))
            line = f'x1="{begin:.2f}" y1="{source}" x2="{end:.2f}" y2="{target}"'
            parts.append(f'<line {line} stroke="#333333" stroke-opacity="0.6" stroke-width="0.7"/>')
    parts.append(f'<text x="{_MARGIN}" y="{bottom + 14}">0 s</text>')
    parts.append(f'<text x="{width - _MARGIN}" y="{bottom + 14}" text-anchor="end">{timeline.makespan:.6g} s</text>')
    return "\n".join([*parts, "</svg>", ""])


def _box(span: Span, left: float, top: float, scale: float, opacity: float) -> list[str]:
    _, fill, ink = _COLOURS[span.action.kind]
    full = (span.end - span.start) * scale
    work = min(full, span.busy * scale)
    tip = f"{span.action} on rank {span.rank}: {span.start:.6g} to {span.end:.6g} s, work {span.busy:.6g} s"
    parts = [f"<g><title>{escape(tip)}</title>"]
    for begin, wide, visible in ((left, work, opacity), (left + work, full - work, 0.2)):
        if wide > 0:
            place = f'x="{begin:.2f}" y="{top}" width="{wide:.2f}" height="{_BOX}"'
            parts.append(
                f'<rect {place} fill="{fill}" fill-opacity="{visible:.2f}" stroke="#ffffff" stroke-width="0.5"/>'
            )
    text = str(span.action.microbatch)
    if work >= 8 * len(text):
        place = f'x="{left + work / 2:.2f}" y="{top + 14}" text-anchor="middle"'
        parts.append(f'<text {place} fill="{ink if opacity > 0.6 else "#000000"}">{text}</text>')
    return [*parts, "</g>"]


def _legend(timeline: Timeline) -> list[str]:
    present = {span.action.kind for span in timeline}
    parts, left = [], _MARGIN
    for kind, (name, fill, _) in _COLOURS.items():
        if kind in present:
            parts.append(f'<rect x="{left}" y="28" width="12" height="12" fill="{fill}"/>')
            parts.append(f'<text x="{left + 16}" y="38">{escape(name)}</text>')
            left += 36 + 7 * len(name)
    return parts

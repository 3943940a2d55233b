"""Labels at the ends of curves, in place of a legend."""


def apart(heights, least):
    """Heights of labels, as near to the given ones as they can be, each at least so far from the next."""
    order, placed = sorted(range(len(heights)), key=lambda number: heights[number]), list(heights)
    for _ in range(200):
        for low, high in zip(order, order[1:], strict=False):
            missing = least - (placed[high] - placed[low])
            if missing > 1e-9:
                placed[low], placed[high] = placed[low] - missing / 2, placed[high] + missing / 2
    return placed


def label_ends(axes, ends):
    """Write the label of each curve to the right of its end; an end is `(x, y, label, colour)`."""
    ends = ends[::-1]  # of curves that end level the first has its label on top
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    heights = apart([y for _, y, _, _ in ends], (high - low) / 20)
    for (x, y, label, color), height in zip(ends, heights, strict=True):
        beside = (x + 0.015 * (right - left), height)
        axes.annotate(label, (x, y), beside, color=color, va="center", fontsize=9)
    axes.set_xlim(left, right + 0.35 * (right - left))

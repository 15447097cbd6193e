"""Loss and metric by epoch, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


def plot(history: list[dict], metric: str, path: Path) -> None:
    """Write a PNG of two panels, loss and metric: dev, and train (with dropout) where known."""
    # A bare Figure draws with Agg and needs no display.
    figure = Figure(figsize=(8, 3), layout="constrained")
    epochs = [figures["epoch"] for figures in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", metric), strict=True):
        for key, label in ((name, "train"), (f"dev_{name}", "dev")):
            if key in history[0]:
                axes.plot(epochs, [f[key] for f in history], marker="o", label=label)
        axes.set(xlabel="epoch", ylabel=name, xticks=epochs)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)

"""What a run shows: a bar that moves where there is a terminal, a line an epoch everywhere."""

import keras
from record import Record
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class EpochProgress(keras.callbacks.Callback):
    """Show the epochs of `fit`. Use it as a context, so that the bar is gone on errors.

    Args:
        console: where to print.
        epochs: number of epochs.
        examples: training examples of an epoch.
        record: what has the figures of every epoch before this callback runs.
    """

    def __init__(self, console: Console, epochs: int, examples: int, record: Record):
        super().__init__()
        self.console, self.epochs, self.examples = console, epochs, examples
        self.record = record
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3f}  "
                f"best dev {record.metric} {{task.fields[best]:.2%}}"
            ),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", **self._fields(epoch=0))

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def on_epoch_begin(self, epoch, logs=None):
        steps = self.params["steps"]
        self.bar.reset(self.task, total=steps, **self._fields(epoch))  # fields are not kept

    def on_train_batch_end(self, batch, logs=None):
        if self.console.is_terminal:  # reading a figure waits for the device
            self.bar.update(self.task, completed=batch + 1, loss=float(logs["crossentropy"]))

    def on_epoch_end(self, epoch, logs=None):
        figures, metric = self.record.history[-1], self.record.metric
        best = self._fields(epoch)["best"]
        dev_loss = f"dev loss {figures['dev_loss']:.3f}  " if "dev_loss" in figures else ""
        self.console.print(
            f"epoch {epoch + 1}/{self.epochs}  loss {figures['loss']:.3f}  {dev_loss}"
            f"dev {metric} {figures[f'dev_{metric}']:.2%} (best {best:.2%})  "
            f"{figures['seconds']:.1f} s, {self.examples / figures['seconds']:,.0f} examples/s",
            highlight=False,
            soft_wrap=True,
        )

    def _fields(self, epoch: int) -> dict:
        nan = float("nan")
        key = f"dev_{self.record.metric}"
        best = max((figures[key] for figures in self.record.history), default=nan)
        return {"epoch": epoch + 1, "epochs": self.epochs, "loss": nan, "best": best}

"""llamatrain.train with a fault on one rank, for torchrun: `-m tests.distributed.planted RANK STEP OVERRIDE …`."""

import sys

from llamatrain import train


def main() -> None:
    rank, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    from llamatrain.trainer import Trainer

    original = Trainer.train_step

    def train_step(self, batch):
        if self.world.rank == rank and self.step == step:
            raise ZeroDivisionError("planted on purpose")
        return original(self, batch)

    Trainer.train_step = train_step
    train.main()


if __name__ == "__main__":
    main()

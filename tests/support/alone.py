"""A stand-in for the processes of a launcher, for code that runs in one process."""

import torch


class Alone:
    """The only process of a run, with the interface of Accelerate's state."""

    process_index, num_processes, is_main_process, device = 0, 1, True, torch.device("cpu")

    def wait_for_everyone(self) -> None:
        """Return at once, since there is no other process."""

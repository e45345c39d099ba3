"""For every test: one thread, since the models are too small for more and other work shares the machine."""

import torch

torch.set_num_threads(1)

"""How each kind of task asks and judges; `evaluation.catalogue` lists them."""

"""How the model is spread over the processes of a run."""

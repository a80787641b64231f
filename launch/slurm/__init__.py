"""Runs as jobs of a SLURM cluster: train.sbatch is the job, `python -m launch.slurm` composes, checks and submits it.

config    what a launch and a cluster are, and their checks
job       from there to sbatch's options and the setup file: pure functions of texts
"""

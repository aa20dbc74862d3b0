"""The mathematics of online RL: rewards, advantages, clipping, loss, and the shared-prefix forward pass.

Pure functions: nothing here imports a trainer.
"""

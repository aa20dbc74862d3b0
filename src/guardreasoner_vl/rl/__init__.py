"""The mathematics of online RL: rewards, advantages, clipping, loss, and the shared-prefix forward pass.

Nothing here knows a trainer.
"""

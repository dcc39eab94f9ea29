"""Diffusion and rectified flow as plain maths: schedules, objectives, samplers, guidance."""

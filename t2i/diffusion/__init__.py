"""Diffusion and rectified flow as plain maths: schedules, objectives, samplers, guidance."""

from t2i.diffusion.guidance import classifier_free, guided
from t2i.diffusion.objectives import Objective, Prediction, check_objective, loss_weight, target, to_x0_eps
from t2i.diffusion.samplers import SAMPLERS, Denoise, NoiseLevels, Sampler, noise_levels, sample
from t2i.diffusion.schedules import (
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    ScheduleConfig,
    Spacing,
    betas,
    build_schedule,
)

__all__ = [
    "SAMPLERS",
    "Denoise",
    "DiscreteSchedule",
    "FlowSchedule",
    "NoiseLevels",
    "Objective",
    "Prediction",
    "Sampler",
    "Schedule",
    "ScheduleConfig",
    "Spacing",
    "betas",
    "build_schedule",
    "check_objective",
    "classifier_free",
    "guided",
    "loss_weight",
    "noise_levels",
    "sample",
    "target",
    "to_x0_eps",
]

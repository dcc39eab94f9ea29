"""diffusers' scheduler_config.json: the noise schedule, what the network predicts, and how pictures are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2i.config import check
from t2i.diffusion.samplers import SAMPLERS
from t2i.interop.parts import bounded, is_one_of

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = ("leading", "linspace", "trailing")
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
SDE = "sde-dpmsolver++"  # algorithm_type of DPMSolverMultistepScheduler: dpmpp_2m_sde
# Of a model that no scheduler's configuration comes with: what Stable Diffusion was trained with, and is drawn with.
SCHEDULE: dict[str, Any] = {
    "name": "scaled_linear",
    "num_train_steps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
ASSUMED_EPS = (
    "Nothing says what the UNet predicts: eps is assumed. Stable Diffusion 2 at 768 px takes --prediction v."
)
SAMPLING: dict[str, Any] = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}

# Entries that change pictures and have one value in our samplers.
FIXED: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", SDE),
    "disable_corrector": ([],),
    "euler_at_final": (False,),
    "flow_shift": (1.0,),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-float("inf"),),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small"),
}
READ = {
    *("beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type", "num_train_timesteps"),
    *("rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "skip_prk_steps", "clip_sample"),
}
# Of no consequence while the entries above are as they are, or told by diffusers' own versions.
WITHOUT_EFFECT = {
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type"),
    *("timestep_values", "tensor_format"),
}


@dataclass(frozen=True)
class Scheduler:
    """schedule, prediction, sampling: the entries `schedule`, `objective.prediction` and `sampling` of an ldm run
    notes: sentences that name what could not be taken over"""

    schedule: dict[str, Any]
    prediction: str
    sampling: dict[str, Any]
    notes: list[str]


def read_scheduler(values: Mapping[str, Any], place: str, stable_diffusion: bool) -> Scheduler:
    """scheduler_config.json -> what a run says in its place. Raises ConfigError.

    stable_diffusion: of a StableDiffusionPipeline, which sets steps_offset to 1 and clip_sample to false, whatever
        the file says
    """
    name = values.get("beta_schedule", "linear")
    check(name in tuple(SCHEDULES), f"{place}: beta_schedule", name, ", ".join(SCHEDULES))
    trained = values.get("trained_betas")
    check(trained is None, f"{place}: trained_betas", trained, "null")
    prediction = values.get("prediction_type", "epsilon")
    check(prediction in tuple(PREDICTIONS), f"{place}: prediction_type", prediction, ", ".join(PREDICTIONS))
    steps = bounded(values.get("num_train_timesteps", 1000), f"{place}: num_train_timesteps", 100_000)
    schedule: dict[str, Any] = {"name": SCHEDULES[name], "num_train_steps": steps}
    if name != "squaredcos_cap_v2":
        for key, default in {"beta_start": 0.0001, "beta_end": 0.02}.items():
            schedule[key] = beta = values.get(key, default)
            ok = type(beta) in (int, float) and 0 < beta < 1
            check(ok, f"{place}: {key}", beta, "a number above 0 and below 1")
    if _flag(values, "rescale_betas_zero_snr", place):
        schedule["zero_terminal_snr"] = True
    kind = values.get("_class_name")
    sampler = CLASSES.get(kind) if isinstance(kind, str) else None
    if sampler == "dpmpp_2m" and values.get("algorithm_type") == SDE:
        sampler = "dpmpp_2m_sde"
    notes = []
    if sampler is None and kind is not None:
        notes.append(
            f"{place}: {kind} is no sampler of t2i's: {SAMPLING['sampler']} is the run's; others: --sampler."
        )
    sampling = SAMPLING | {"sampler": sampler or SAMPLING["sampler"]}
    sampling |= _grid(values, place, sampling["sampler"], stable_diffusion)
    notes += _left_out(values, place, stable_diffusion)
    return Scheduler(schedule, PREDICTIONS[prediction], sampling, notes)


def _grid(values: Mapping[str, Any], place: str, sampler: str, stable_diffusion: bool) -> dict[str, Any]:
    """The entries of `t2i.diffusion.config.GridConfig`."""
    spacing = values.get("timestep_spacing")
    check(spacing in (None, *SPACINGS), f"{place}: timestep_spacing", spacing, ", ".join(SPACINGS))
    if spacing is None and _flag(values, "rescale_betas_zero_snr", place):
        spacing = SAMPLERS[sampler].spacing  # as diffusers does; ours would be "trailing"
    offset = 1 if stable_diffusion else values.get("steps_offset", 0)
    check(type(offset) is int and offset >= 0, f"{place}: steps_offset", offset, "a whole number, 0 or more")
    final = values.get("final_sigmas_type", "zero")
    check(final in ("zero", "sigma_min"), f"{place}: final_sigmas_type", final, "zero, sigma_min")
    alpha_one = values.get("set_alpha_to_one")
    check(is_one_of(alpha_one, (None, True, False)), f"{place}: set_alpha_to_one", alpha_one, "true, false")
    levels = {key: _flag(values, key, place) for key in ("use_karras_sigmas", "use_exponential_sigmas")}
    return {
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": alpha_one,
        "final_sigmas_type": final,
        **levels,
    }


def _flag(values: Mapping[str, Any], key: str, place: str) -> bool:
    """An entry that is false where it is not there or null."""
    found = values.get(key)
    check(is_one_of(found, (None, True, False)), f"{place}: {key}", found, "true, false")
    return found is True


def _left_out(values: Mapping[str, Any], place: str, stable_diffusion: bool) -> list[str]:
    fixed = dict(FIXED)
    if values.get("_class_name") == "UniPCMultistepScheduler":
        fixed["solver_type"] = ("bh2",)
    if values.get("_class_name") == "PNDMScheduler":
        fixed["skip_prk_steps"] = (True,)
        values = {"skip_prk_steps": False} | dict(values)  # diffusers' default
    if not stable_diffusion and values.get("_class_name") in ("DDIMScheduler", "DDPMScheduler"):
        fixed["clip_sample"] = (False,)
        values = {"clip_sample": True} | dict(values)
    notes = []
    for key, value in values.items():
        if key in fixed and not is_one_of(value, fixed[key]):
            notes.append(
                f"{place}: {key} is {value!r}, which t2i's samplers cannot do: {fixed[key][0]!r} is used."
            )
        elif key not in fixed and key not in READ | WITHOUT_EFFECT and not key.startswith("_"):
            notes.append(f"{place}: {key} ({value!r}) is not known to t2i, and was left out.")
    return notes


def write_scheduler(
    schedule: Mapping[str, Any], prediction: str, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The inverse: the fields that Stable Diffusion 1 was published with, and those that say something else."""
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    classes = {ours: theirs for theirs, ours in CLASSES.items()}
    classes["dpmpp_2m_sde"] = classes["dpmpp_2m"]
    zero_snr = bool(schedule.get("zero_terminal_snr", False))
    sampler, spacing = sampling["sampler"], sampling.get("timestep_spacing")
    if zero_snr and sampler in ("pndm", "heun"):  # whose classes cannot rescale the schedule
        sampler = "ddim"
    values: dict[str, Any] = {
        "_class_name": classes[sampler],
        "beta_schedule": names[schedule["name"]],
        "beta_start": schedule.get("beta_start") or 0.00085,
        "beta_end": schedule.get("beta_end") or 0.012,
        "clip_sample": False,
        "num_train_timesteps": schedule["num_train_steps"],
        "prediction_type": predictions[prediction],
        "skip_prk_steps": True,
        "steps_offset": sampling.get("steps_offset", 1),
        "trained_betas": None,
    }
    alpha_one = sampling.get("set_alpha_to_one", False)
    if alpha_one is not None:
        values["set_alpha_to_one"] = alpha_one
    if zero_snr:  # 2305.08891: only the last timestep has no signal left, so that sampling has to start there
        values["rescale_betas_zero_snr"] = True
        spacing = spacing or "trailing"
    if spacing is not None:
        values["timestep_spacing"] = spacing
    if sampling.get("final_sigmas_type", "zero") != "zero":
        values["final_sigmas_type"] = sampling["final_sigmas_type"]
    for key in ("use_karras_sigmas", "use_exponential_sigmas"):
        if sampling.get(key, False):
            values[key] = True
    if sampler == "dpmpp_2m_sde":
        values["algorithm_type"] = SDE
    return values

"""Deterministic samplers: each is one short update and a table of its steps; they share one loop.

All follow x_t = alpha x_0 + sigma eps as sigma falls. DDIM and DPM-Solver++ keep the variance,
alpha^2 + sigma^2 = 1; Euler rides on x_t / alpha (Karras et al. 2022), where alpha = 1 and sigma is the
noise-to-signal ratio. The tables are computed on the host in float64; the updates run in float32 whatever
the model's dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infinite_id_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from infinite_id_jax.errors import InputError
from infinite_id_jax.typing import Array, Denoise, Float, Latents, Scalar

SCHEDULERS = ("ddim", "euler", "dpm++")

Column = Any  # numpy [S] as tabulated on the host, a jax scalar inside the loop
_Table = Float[np.ndarray, "S"]


class Step(NamedTuple):
    """One step from (alpha, sigma) to (alpha_next, sigma_next); with columns [S], a whole trajectory."""

    t: Column  # the timestep told to the model; Euler's may be fractional
    alpha: Column
    sigma: Column
    alpha_next: Column
    sigma_next: Column
    extrapolation: Column  # 1 / (2 r) of DPM-Solver++(2M); 0 makes a first-order step


class Trajectory(NamedTuple):
    """The float32 table of one sampler: a pytree, so that a jitted loop takes it as a traced input."""

    initial_sigma: Any  # [], the standard deviation of x_T
    steps: Step  # columns [S]

    @property
    def timesteps(self) -> Column:
        return self.steps.t


def trajectory(name: str, config: ScheduleConfig, steps: int) -> Trajectory:
    """Tabulate `steps` steps of sampler `name`.

    Raises InputError for a name not in SCHEDULERS, for steps outside 1 .. num_train_timesteps, and for more
    steps than the timestep spacing can tell apart.
    """
    _check_name(name)
    if not 1 <= steps <= config.num_train_timesteps:
        raise InputError(f"{steps} steps were asked for: choose 1 to {config.num_train_timesteps}.")
    t = _spaced_timesteps(name, config, steps)
    if t[0] > config.num_train_timesteps - 1 or np.any(np.diff(t) >= 0):
        raise InputError(
            f"{steps} steps are too many for {name} over {config.num_train_timesteps} timesteps with "
            f"timestep_spacing={config.timestep_spacing!r}, steps_offset={config.steps_offset}: take fewer."
        )
    table = _ddim_table(config, t) if name == "ddim" else _sigma_table(name, config, t)
    return jax.tree.map(lambda column: np.asarray(column, np.float32), table)


def sample(
    name: str,
    trajectory: Trajectory,
    denoise: Denoise,
    noise: Latents,
    kept: Any = None,
    *,
    prediction_type: str,
) -> Latents:
    """Integrate unit normal `noise` [B, h, w, c] to x_0, float32, along a trajectory of the same `name`.

    `denoise(x_t, t, i, kept)` sees x_t scaled to alpha^2 + sigma^2 = 1 and what the step before kept, `kept` at first;
    it returns the guided eps or v, as `prediction_type` says (epsilon or v_prediction), and what the next step is
    to see. prediction_type and `name` are static, all else may be traced.
    Raises InputError for an unknown `name` or `prediction_type`.
    """
    _check_name(name)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"Unknown prediction type {prediction_type!r}: choose epsilon or v_prediction.")

    def body(carry: tuple[Array, Array, Any], now: tuple[Array, Step]) -> tuple[tuple[Array, Array, Any], None]:
        x_t, x_0_last, kept = carry
        i, step = now
        scale = jnp.hypot(step.alpha, step.sigma)
        model_input = x_t / scale
        output, kept = denoise(model_input, step.t, i, kept)
        output = output.astype(jnp.float32)
        x_0, eps = predict(model_input, output, step.alpha / scale, step.sigma / scale, prediction_type)
        match name:
            case "ddim":
                x_t = ddim(x_0, eps, step)
            case "euler":
                x_t = euler(x_0, eps, step)
            case "dpm++":
                x_t = dpm_solver_pp(x_t, x_0, x_0_last, step)
        return (x_t, x_0, kept), None

    x_T = noise.astype(jnp.float32) * trajectory.initial_sigma
    counter = jnp.arange(len(trajectory.timesteps), dtype=jnp.int32)
    (x_0, _, _), _ = jax.lax.scan(body, (x_T, jnp.zeros_like(x_T), kept), (counter, trajectory.steps))
    return x_0


def predict(
    x_t: Latents, output: Latents, alpha: Scalar, sigma: Scalar, prediction_type: str
) -> tuple[Latents, Latents]:
    """x_0 and eps of x_t = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1, from the model's output.

    That is eps (Ho et al. 2020, Eq. 15) or v = alpha eps - sigma x_0 (Salimans & Ho 2022, App. D).
    """
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha, output
    return alpha * x_t - sigma * output, sigma * x_t + alpha * output


def ddim(x_0: Latents, eps: Latents, step: Step) -> Latents:
    """sqrt(alpha_bar_{t-1}) x_0 + sqrt(1 - alpha_bar_{t-1}) eps (Song et al. 2021, Eq. 12 without noise)."""
    return step.alpha_next * x_0 + step.sigma_next * eps


def euler(x_0: Latents, eps: Latents, step: Step) -> Latents:
    """One Euler step of dx / dsigma = eps (Karras et al. 2022, Algorithm 1 uncorrected, s(t) = 1).

    It is x_t + (sigma_next - sigma) eps with x_t = x_0 + sigma eps put in: large sigmas cancel here rather than
    in float32.
    """
    return x_0 + step.sigma_next * eps


def dpm_solver_pp(x_t: Latents, x_0: Latents, x_0_last: Latents, step: Step) -> Latents:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2).

    Their e^-h is written alpha sigma_next / (sigma alpha_next), which is finite where sigma_next = 0.
    """
    D = x_0 + step.extrapolation * (x_0 - x_0_last)
    ratio = step.sigma_next / step.sigma
    return ratio * x_t + (step.alpha_next - step.alpha * ratio) * D


def _check_name(name: str) -> None:
    if name not in SCHEDULERS:
        raise InputError(f"Unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}.")


def _spaced_timesteps(name: str, config: ScheduleConfig, steps: int) -> _Table:
    """Falling timesteps (Lin et al. 2023, Table 2).

    But for "trailing", DPM++ spaces one point more, the end it steps to, and drops it.
    """
    T = config.num_train_timesteps
    points = steps + 1 if name == "dpm++" else steps
    match config.timestep_spacing:
        case "leading":
            t = np.arange(points) * (T // points) + config.steps_offset
        case "linspace":
            t = np.linspace(0, T - 1, points)
            t = t if name == "euler" else t.round()
        case _:
            # arange rounds its ties as diffusers does; by the float stride it may hold one entry too many.
            return np.arange(T, 0, -T / steps)[:steps].round() - 1
    return t[::-1][:steps].astype(np.float64)


def _ddim_table(config: ScheduleConfig, t: _Table) -> Trajectory:
    alpha_bar = alphas_cumprod(config)
    # The stride is whole, as in diffusers: it meets the next timestep exactly in "leading" spacing alone.
    t_next = t.astype(int) - config.num_train_timesteps // len(t)
    final = 1.0 if config.set_alpha_to_one else alpha_bar[0]
    now, after = alpha_bar[t.astype(int)], np.where(t_next >= 0, alpha_bar[np.maximum(t_next, 0)], final)
    first_order = np.zeros(len(t))
    steps = Step(t, np.sqrt(now), np.sqrt(1 - now), np.sqrt(after), np.sqrt(1 - after), first_order)
    return Trajectory(np.float64(1), steps)


def _sigma_table(name: str, config: ScheduleConfig, t: _Table) -> Trajectory:
    """Euler and DPM++: the noise-to-signal ratio sigma at each timestep, then the final one."""
    alpha_bar = alphas_cumprod(config)
    trained = np.sqrt((1 - alpha_bar) / alpha_bar)
    sigma = np.interp(t, np.arange(len(trained)), trained)
    if config.use_karras_sigmas:
        # Euler keeps the range of its spaced timesteps, DPM++ takes all of the trained one.
        largest, smallest = (sigma[0], sigma[-1]) if name == "euler" else (trained[-1], trained[0])
        sigma = karras_sigmas(largest, smallest, len(t))
        t = np.interp(np.log(sigma), np.log(trained), np.arange(len(trained)))
        t = t if name == "euler" else t.round()
    final = 0.0 if config.final_sigmas_type == "zero" else trained[0]
    sigma = np.append(sigma, final)
    if name == "euler":
        # "leading" starts below the last trained timestep, where x_T holds signal too: alpha^2 + sigma^2.
        initial = np.sqrt(sigma[0] ** 2 + 1) if config.timestep_spacing == "leading" else sigma[0]
        one = np.ones(len(t))
        return Trajectory(initial, Step(t, one, sigma[:-1], one, sigma[1:], np.zeros(len(t))))
    alpha = 1 / np.sqrt(sigma**2 + 1)
    steps = Step(t, alpha[:-1], (alpha * sigma)[:-1], alpha[1:], (alpha * sigma)[1:], _extrapolation(sigma))
    return Trajectory(np.float64(1), steps)


def _extrapolation(sigma: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points-1"]:
    """1 / (2 r_i) with r_i = h_{i-1} / h_i, the steps h of lambda = -log sigma.

    First order (0) are the first step, a last one to sigma = 0, where h is infinite, and below 15 steps any
    last one (diffusers' `lower_order_final`).
    """
    h = -np.diff(np.log(sigma[sigma > 0]))
    half_inverse_r = np.zeros(len(sigma) - 1)
    half_inverse_r[1 : len(h)] = h[1:] / (2 * h[:-1])
    if len(half_inverse_r) < 15:
        half_inverse_r[-1] = 0
    return half_inverse_r


def karras_sigmas(largest: float, smallest: float, steps: int) -> _Table:
    """Sigmas falling with evenly spaced seventh roots (Karras et al. 2022, Eq. 5, rho = 7)."""
    ends = largest ** (1 / 7), smallest ** (1 / 7)
    return np.linspace(*ends, steps) ** 7

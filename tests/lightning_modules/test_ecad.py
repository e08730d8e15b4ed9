"""ECAD: the numbered properties of its specification, costs of the large networks, one and two processes, resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import caching
import numpy as np
import pytest
import tiny_networks
import torch
from caching import FAMILIES, STEPS, denoiser, fit, method, pipeline, random_schedule, run, times
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.batch import Records
from lightning_t2i.caching import Cost, Executor, Layout, Schedule, apply
from lightning_t2i.caching.archive import hypervolume, non_dominated
from lightning_t2i.caching.calibration import Calibration
from lightning_t2i.caching.search import REFERENCE, Search, SearchOptions
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.load import build_network
from lightning_t2i.options import MethodOptions
from lightning_t2i.processes import DDPM, RectifiedFlow
from lightning_t2i.state_io import newest

KINDS = ("hooks", "static")
SEEDS = range(3)
pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")


def cost_of(network: Any, rows: int = 2) -> Cost:
    return Cost.of(network.backbone, (4, 8, 8), 5, rows)


# ---- executors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_P1_everything_recomputed_is_the_untouched_network(family: str, kind: Any) -> None:
    network = denoiser(family)
    x, t = torch.randn(2, 4, 8, 8), times(network)()
    before, step = run(network), network(x, t[1], tiny_networks.condition())
    with Executor(network.backbone, times(network), kind) as executor:
        assert torch.equal(run(network), before)
        executor.use(Schedule.full(executor.layout, STEPS))
        assert torch.equal(run(network), before)
        executor.reset()
        assert torch.equal(network(x, t[1], tiny_networks.condition()), step)
        executor.use(random_schedule(executor.layout, 0))
        assert not torch.equal(run(network), before)
    assert torch.equal(run(network), before)
    for module in network.modules():
        assert not hasattr(module, "_diffusers_hook") and "forward" not in vars(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_P2_macs_are_what_is_counted(family: str) -> None:
    network = denoiser(family)
    cost, layout = cost_of(network), Layout.of(network.backbone)
    for seed in SEEDS:
        schedule = random_schedule(layout, seed)
        with (
            Executor(network.backbone, times(network), "static").use(schedule),
            sdpa_kernel(SDPBackend.MATH),  # torch has no count of the kernel that CPUs take
            FlopCounterMode(display=False) as counter,
        ):
            run(network, batch=1)
        assert counter.get_total_flops() == 2 * cost.macs(schedule)
    assert cost.macs(Schedule.full(layout, STEPS)) == cost.full(STEPS) > cost.full(STEPS, sdpa=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_P3_bits_of_step_0_do_nothing(family: str) -> None:
    network = denoiser(family)
    layout, cost = Layout.of(network.backbone), cost_of(network)
    schedule = random_schedule(layout, 1)
    rows = schedule.recompute.copy()
    rows[0] = np.arange(layout.width) % 2 == 0
    other = Schedule(rows, layout)
    with Executor(network.backbone, times(network)) as executor:
        first = run_with(executor, network, schedule)
        assert torch.equal(run_with(executor, network, other), first)
    assert cost.macs(other) == cost.macs(schedule) and other.key == schedule.key


def run_with(executor: Executor, network: Any, schedule: Schedule | None, **options: Any) -> torch.Tensor:
    executor.use(schedule)
    return run(network, **options)


def by_hand(network: Any, schedule: Schedule) -> torch.Tensor:
    """Another executor: every component's forward is replaced by one that counts the calls itself."""
    modules, kept, originals = dict(network.backbone.named_modules()), {}, {}
    for column, name in enumerate(schedule.layout.components):
        module = modules[name]
        originals[name] = module.forward
        calls = iter(range(schedule.steps))

        def forward(*args: Any, column=column, call=module.forward, calls=calls, **kwargs: Any) -> Any:
            n = next(calls)
            if n == 0 or schedule.recompute[n, column]:
                kept[column] = call(*args, **kwargs)
            return kept[column]

        module.forward = forward
    try:
        return run(network)
    finally:
        for name in originals:
            del modules[name].forward


@pytest.mark.parametrize("family", FAMILIES)
def test_P4_executors_agree_in_every_bit(family: str) -> None:
    network = denoiser(family)
    layout = Layout.of(network.backbone)
    for seed in SEEDS:
        schedule = random_schedule(layout, seed, share=0.2 + 0.2 * seed)
        goal = by_hand(network, schedule)
        for kind in KINDS:
            with Executor(network.backbone, times(network), kind) as executor:
                assert torch.equal(run_with(executor, network, schedule), goal), (seed, kind)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own import
@pytest.mark.parametrize("family", FAMILIES)
def test_P4_compiled_programs_are_few_and_close(family: str) -> None:
    from torch._dynamo.utils import counters

    from lightning_t2i.caching.programs import program

    program.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    network = denoiser(family)
    layout = Layout.of(network.backbone)
    for seed in SEEDS if family == "pixart" else SEEDS[:1]:  # compiling takes long
        schedule = random_schedule(layout, seed)
        outputs = []
        for kind in ("static", "compiled"):
            with Executor(network.backbone, times(network), kind).use(schedule):
                x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
                steps = [network(x, t, tiny_networks.condition()) for t in times(network)()]
                outputs.append(torch.stack(steps))
        assert torch.allclose(*outputs, atol=1e-5, rtol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 8 * len(layout.stacks)


@pytest.mark.parametrize("family", FAMILIES)
def test_P5_reuse_of_constant_outputs_changes_nothing(family: str) -> None:
    network = denoiser(family)
    cond, x = tiny_networks.condition(), torch.randn(2, 4, 8, 8)
    t = times(network)()[2]
    once = network(x, t, cond)
    schedule = random_schedule(Layout.of(network.backbone), 0)
    with Executor(network.backbone, times(network)).use(schedule) as executor:
        frozen = network.backbone.forward
        for step, time in enumerate(times(network)()):
            executor.begin(executor.times()[step], "")
            executor.begin = lambda *unused: None  # the network is asked at t, whatever the step
            assert torch.equal(network(x, t, cond), once), (step, time)
            del executor.begin
        assert frozen is network.backbone.forward


def test_P6_gates_are_those_of_the_step() -> None:
    """A reused output keeps its value and is multiplied by the gate of now: twice the gate, twice the contribution."""
    network = denoiser("pixart")
    block = network.backbone.transformer_blocks[-1]
    layout = Layout.of(network.backbone)
    rows = np.ones((STEPS, layout.width), bool)
    rows[1:, layout.columns("attn2")] = False
    reused_attention = Schedule(rows, layout)
    seen: list[torch.Tensor] = []
    attention = block.attn2.register_forward_hook(lambda *a: seen.append(a[-1]))
    with Executor(network.backbone, times(network)) as executor:
        run_with(executor, network, reused_attention)
    attention.remove()
    assert len(seen) == STEPS and all(torch.equal(x, seen[0]) for x in seen)

    rows = np.ones((STEPS, layout.width), bool)
    rows[1:, -1] = False  # the last feed-forward
    outputs = {}
    for gate in (0.0, 1.0, 2.0):
        with Executor(network.backbone, times(network)).use(Schedule(rows, layout)) as executor:
            x, cond = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), tiny_networks.condition(1)
            network(x, times(network)()[0], cond)
            kept = executor.slots.values[layout.width - 1]
            before = block.scale_shift_table.data.clone()
            inputs: list[Any] = []
            hook = block.register_forward_pre_hook(
                lambda m, a, k, inputs=inputs: inputs.append((a, k)), with_kwargs=True
            )
            network(x, times(network)()[1], cond)
            hook.remove()
            (args, kwargs) = inputs[0]
            time = kwargs["timestep"].clone().view(1, 6, -1)
            block.scale_shift_table.data[5] = 0
            time[:, 5] = gate
            outputs[gate] = block(*args, **{**kwargs, "timestep": time.flatten(1)})
            block.scale_shift_table.data = before
    assert torch.allclose(outputs[1.0] - outputs[0.0], kept, atol=1e-5)
    assert torch.allclose(outputs[2.0] - outputs[0.0], 2 * kept, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_P7_a_bit_changes_its_own_step_and_none_before(family: str) -> None:
    network = denoiser(family)
    layout = Layout.of(network.backbone)
    full = Schedule.full(layout, STEPS)
    rows = full.recompute.copy()
    rows[-1, -1] = False
    steps: dict[str, list[torch.Tensor]] = {}
    for name, schedule in (("full", full), ("changed", Schedule(rows, layout))):
        found = steps[name] = []
        hook = network.backbone.register_forward_hook(lambda m, a, out, found=found: found.append(out[0].clone()))
        with Executor(network.backbone, times(network)) as executor:
            run_with(executor, network, schedule)
        hook.remove()
    same = [torch.equal(a, b) for a, b in zip(*steps.values(), strict=True)]
    assert same == [True] * (STEPS - 1) + [False]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_P8_every_sampling_begins_with_empty_slots(family: str, kind: Any) -> None:
    network = denoiser(family)
    schedule = random_schedule(Layout.of(network.backbone), 2)
    with Executor(network.backbone, times(network), kind).use(schedule):
        first = run(network)
        assert torch.equal(run(network), first)
        calls = iter(range(99))

        def stop(*unused: Any) -> None:
            if next(calls) == 2:
                raise Interrupted

        hook = network.backbone.register_forward_hook(stop)
        with pytest.raises(Interrupted):
            run(network, seed=5)
        hook.remove()
        assert torch.equal(run(network), first)
        run(network, batch=1)
        assert torch.equal(run(network), first)


def test_P9_two_passes_keep_their_own_slots() -> None:
    """Guidance in two passes, each in its context, gives the pictures of guidance in one."""
    network = denoiser("pixart")
    schedule, cond = random_schedule(Layout.of(network.backbone), 0), tiny_networks.condition()
    z = torch.randn(2, 4, 8, 8)
    found = []
    for passes in (1, 2):
        with Executor(network.backbone, times(network)).use(schedule) as executor:
            x = z
            for t, s in zip(times(network)(), [*times(network)()[1:], torch.tensor(-1)], strict=True):
                if passes == 1:
                    both = network.x0(torch.cat([x, x]), t, cond.cat(cond.null()))
                    a, b = both.chunk(2)
                else:
                    parts = []
                    for name, c in (("cond", cond), ("uncond", cond.null())):
                        _set_cache_context(network.backbone, CacheContext(name))
                        parts.append(network.x0(x, t, c))
                    a, b = parts
                    assert set(executor.contexts) == {"cond", "uncond"}
                x = network.process.step(x, t, s, b + 3.0 * (a - b))
            found.append(x)
    assert torch.allclose(*found, atol=1e-4)


def test_P10_rows_follow_times_not_calls() -> None:
    """Heun's method calls twice in a step; the second call is at the next time and takes that row."""
    network = denoiser("flux")
    layout = Layout.of(network.backbone)
    rows = np.ones((STEPS, layout.width), bool)
    rows[2] = False
    seen: list[int] = []
    with Executor(network.backbone, times(network)).use(Schedule(rows, layout)) as executor:
        hook = network.backbone.register_forward_hook(lambda *unused: seen.append(executor.slots.step))
        run(network, solver="heun")
        hook.remove()
    assert seen == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    with Executor(network.backbone, times(network)) as executor:
        full = run_with(executor, network, Schedule.full(layout, STEPS), solver="heun")
    assert torch.equal(full, run(network, solver="heun"))


@pytest.mark.parametrize("kind", ["hooks", "static"])
def test_P10_both_calls_of_a_step_find_what_is_kept(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also in the last step that reads a value: what the second call needs is not computed anew."""
    network = denoiser("flux")
    layout = Layout.of(network.backbone)
    rows = np.ones((STEPS, layout.width), bool)
    rows[[1, 3, 4]] = False
    called: list[int] = []
    with Executor(network.backbone, times(network), kind).use(Schedule(rows, layout)) as executor:
        module = dict(network.backbone.named_modules())[layout.components[0]]
        hook = module.register_forward_pre_hook(lambda *unused: called.append(executor.slots.step))
        run(network, solver="heun")
        hook.remove()
    assert "nothing is kept" not in caplog.text
    assert called == ([0, 2, 2] if kind == "static" else [0, 1, 1, 2, 2, 3, 3, 4, 4])  # hooks stand behind the call


def test_P11_dead_computations_are_left_out_and_change_nothing() -> None:
    network = denoiser("flux")
    layout, cost = Layout.of(network.backbone), cost_of(network)
    dead = 0
    for seed in range(6):
        schedule = random_schedule(layout, seed, share=0.4)
        live = Schedule(schedule.plan.live, layout)
        with Executor(network.backbone, times(network)) as executor:
            assert torch.equal(run_with(executor, network, schedule), by_hand(network, schedule))
        raw = STEPS * cost.fixed + int(cost.weights @ schedule.recompute.sum(0))
        assert cost.macs(live) == cost.macs(schedule) <= raw
        dead += raw - cost.macs(schedule)
    assert dead > 0
    pixart = random_schedule(Layout.of(denoiser("pixart").backbone), 0)
    assert np.array_equal(pixart.plan.live, pixart.recompute)  # there every output is read at once


# ---- the search ------------------------------------------------------------------------------------------------------


def objectives(genomes: np.ndarray) -> np.ndarray:
    """Independent gains and prices of bits."""
    gain, price = (np.random.default_rng(seed).random(genomes.shape[1]) + 0.1 for seed in (5, 6))
    return np.stack([1 - genomes @ gain / gain.sum(), genomes @ price / price.sum()], 1)


def evolved(search: Search, generations: int, f: Any = objectives) -> Search:
    for _ in range(generations):
        search.tell(f(search.ask()))
    return search


def test_P12_operators() -> None:
    n, options = 60, SearchOptions(40, mutate=0.0)
    search = Search(n, options, 0)
    crossover, mutation, problem = (
        search.algorithm.mating.crossover,
        search.algorithm.mating.mutation,
        search.algorithm.problem,
    )
    rng = np.random.default_rng(0)
    parents = rng.random((2, 30, n)) < 0.5
    children = crossover._do(problem, parents, random_state=rng)
    assert np.array_equal(np.sort(children, 0), np.sort(parents, 0))  # each place keeps its pair of alleles
    assert not np.array_equal(children, parents)
    same = np.stack([parents[0], parents[0]])
    assert np.array_equal(crossover._do(problem, same, random_state=rng), same)
    from pymoo.core.population import Population

    for mutate, bit, expected in ((0.05, None, 0.05), (1.0, None, 1.0), (0.5, 0.1, 0.05 * n)):
        mutation = Search(n, SearchOptions(40, mutate=mutate, mutate_bit=bit), 0).algorithm.mating.mutation
        before = rng.random((4000, n)) < 0.5
        after = mutation.do(problem, Population.new("X", before.copy()), random_state=rng).get("X").astype(bool)
        flips = (after != before).sum() / 4000
        assert abs(flips - expected) < 4 * (expected / 4000) ** 0.5 + 0.05 * expected
    search = evolved(Search(8, SearchOptions(10, mutate=1.0), 0), 4)
    asked = search.ask()
    both = np.concatenate([search.population, asked])
    assert len(np.unique(both, axis=0)) == len(both)
    lone = Search(
        3, SearchOptions(8, mutate=1.0), 0, np.unpackbits(np.arange(8, dtype=np.uint8)[:, None], axis=1)[:, 5:]
    )
    lone = evolved(lone, 1)
    everything = lone.population.all(1)
    assert everything.any() and lone.algorithm.pop[everything].get("G").max() > 0
    assert not lone.algorithm.opt.get("X").astype(bool).all(1).any()


def test_P13_the_front_of_a_closed_form_is_found_and_ranks_are_pymoos() -> None:
    """OneMax and ZeroMax: every number of ones from 0 to n - 1 is a point of the front; all ones is forbidden."""

    def one_zero(genomes: np.ndarray) -> np.ndarray:
        ones = genomes.sum(1)
        return np.stack([-ones, ones], 1).astype(float)

    search = evolved(Search(10, SearchOptions(24, mutate=1.0), 0), 25, one_zero)
    feasible = search.population[~search.population.all(1)]
    assert set(feasible.sum(1)) == set(range(10))
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    for seed in SEEDS:
        f = np.random.default_rng(seed).integers(0, 6, (40, 2)).astype(float)  # ties and duplicates
        theirs = {tuple(x) for x in f[NonDominatedSorting().do(f, only_non_dominated_front=True)]}
        assert {tuple(x) for x in f[non_dominated(-f[:, 0], f[:, 1])]} == theirs


def test_P14_known_optimum() -> None:
    """Additive gains: the best subsets for a budget take bits by the ratio of gain and price."""
    n = 24
    search = evolved(Search(n, SearchOptions(48, mutate=1.0), 0), 120)
    gain, price = (np.random.default_rng(seed).random(n) + 0.1 for seed in (5, 6))
    order = np.argsort(-gain / price)
    greedy = np.array([[np.isin(np.arange(n), order[:k]) for k in range(n)]]).reshape(n, n)
    found, best = objectives(search.population), objectives(greedy)
    volumes = [hypervolume(1 - f[:, 0], f[:, 1], 0.0, 1.0, 1.0) for f in (found, best)]
    assert volumes[0] > 0.97 * volumes[1]


def test_P15_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    whole = method(source)
    fit(tmp_path / "whole", whole, 5)
    first = method(source)
    saves = Checkpoints(tmp_path / "half" / "checkpoints", CheckpointOptions(every=1, keep=9))
    fit(tmp_path / "half", first, 3, callbacks=[saves])
    assert sorted(p.name for p in (tmp_path / "half/checkpoints").iterdir()) == [f"step-{i:08d}" for i in (1, 2, 3)]
    second = method(source)
    fit(tmp_path / "half", second, 5, resume=newest(tmp_path / "half" / "checkpoints"))
    assert same_states(whole.progress.state(), second.progress.state())
    assert len(second.progress.history) == 5
    files = [(tmp_path / name / "front.json").read_text() for name in ("whole", "half")]
    assert files[0] == files[1]


def same_states(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_states(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def search_on_ranks(rank: int, folder: str, source: str) -> dict[str, Any]:
    module = method(source)
    fit(Path(folder), module, 3, replicate=2)
    return module.progress.state()


def test_P16_two_processes_come_to_the_same_populations(tmp_path: Path, ranks: Any) -> None:
    source = pipeline(tmp_path / "pipeline")
    alone = method(source)
    fit(tmp_path / "alone", alone, 3)
    for state in ranks(search_on_ranks, str(tmp_path / "both"), source):
        assert same_states(state, alone.progress.state())


def test_P17_schedules_survive_json_and_refuse_other_networks(tmp_path: Path) -> None:
    layout = Layout.of(denoiser("flux").backbone)
    schedule = random_schedule(layout, 0)
    schedule.save(tmp_path / "s.json", quality=1.5)
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["quality"] == 1.5 and content["meaning of recompute"].startswith("1: computed")
    again = Schedule.load(tmp_path / "s.json")
    assert np.array_equal(again.recompute, schedule.recompute) and again.layout == layout
    other = Layout.of(denoiser("pixart").backbone)
    with pytest.raises(UserError, match="other blocks"):
        again.check(other, STEPS)
    with pytest.raises(UserError, match="other blocks"):
        again.check(replace(layout, stacks=layout.stacks[:1]), STEPS)
    with pytest.raises(UserError, match="number of steps"):
        again.check(layout, STEPS + 1)
    network = denoiser("flux")
    with apply(network.backbone, again, times=times(network, STEPS + 2)), pytest.raises(UserError, match="steps"):
        run(network, steps=STEPS + 2)
    for broken in ({}, {**content, "steps": 9}, {**content, "recompute": ["111"]}, {**content, "recompute": [7]}):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(UserError):
            Schedule.load(tmp_path / "broken.json")


def test_P18_noise_belongs_to_prompt_and_seed() -> None:
    records = Records(torch.tensor([40, -3, 12]), torch.arange(3), caption=["a", "b", "c"])
    found: dict[tuple[int, int], torch.Tensor] = {}
    for size, rank, world in ((1, 0, 1), (4, 0, 1), (4, 0, 2), (4, 1, 2)):
        part = Calibration(records, lambda r: None, range(2), size, Keys(0), rank, world)
        for some, _, seeds in part.batches:
            for id, seed, z in zip(some.id.tolist(), seeds.tolist(), part.noise(some, seeds, (2, 2)), strict=True):
                assert torch.equal(found.setdefault((id, seed), z), z)
    assert len(found) == 6 and len({z.sum().item() for z in found.values()}) == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_P19_slots_take_what_is_said(family: str, kind: Any) -> None:
    network = denoiser(family)
    layout, cost = Layout.of(network.backbone), cost_of(network)
    for seed in SEEDS:
        schedule = random_schedule(layout, seed)
        with Executor(network.backbone, times(network), kind).use(schedule) as executor:
            run(network, batch=2)
            assert executor.peak == 2 * cost.slot_bytes(schedule) > 0
            assert executor.slots.values == {}  # nothing is kept after the last step
    single = cost_of(network).slot_bytes(schedule)
    network.backbone.to(torch.bfloat16)
    assert 2 * cost_of(network).slot_bytes(schedule) == single


# ---- costs of the large networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "tokens", "rows", "sdpa", "tmacs"),
    [
        ("pixart_alpha_512", (4, 32, 32), 120, 2, False, 5.714),
        ("pixart_alpha_512", (4, 32, 32), 120, 2, True, 5.962),
        ("flux1_dev", (16, 32, 32), 512, 2, False, 198.69),
        ("flux1_dev", (16, 32, 32), 512, 1, True, 103.48),
    ],
)
def test_macs_of_the_paper(name: str, shape: Any, tokens: int, rows: int, sdpa: bool, tmacs: float) -> None:
    with torch.device("meta"):
        network = build_network(f"configs/networks/{name}.json")
    cost = Cost.of(network, shape, tokens, rows)
    assert cost.full(20, sdpa) / 1e12 == pytest.approx(tmacs, abs=10 ** -(3 if tmacs < 10 else 2) / 2)
    assert cost.layout.width * 20 == {"pixart_alpha_512": 1680, "flux1_dev": 3420}[name]


def test_the_reference_is_the_papers() -> None:
    assert SearchOptions(72, "heuristic", 0.9, 4, 0.05, None, False, False, False, False) == REFERENCE


# ---- the method ------------------------------------------------------------------------------------------------------


def test_a_search_finds_writes_and_samples(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    module = method(source)
    before = {n: p.clone() for n, p in module.named_parameters()}
    fit(tmp_path / "run", module, 3, ends=True)
    assert all(torch.equal(p, before.get(n, p)) and not p.requires_grad for n, p in module.named_parameters())
    assert module.state_dict() == {} and not module.groups
    history = module.progress.history
    assert len(history) == 3 and history == sorted(history)
    found = json.loads((tmp_path / "run/front.json").read_text())
    macs = [point["relative_macs"] for point in found["front"]]
    assert macs == sorted(macs) and all(0 < m < 1 for m in macs)
    assert [p["quality"] for p in found["front"]] == sorted(p["quality"] for p in found["front"])
    assert {"no cache", "FORA 2", "FORA 3", "FORA 4", "TGATE", "2 steps"} <= found["baselines"].keys()
    assert all("fresh_quality" in point for point in found["front"])
    for name in ("front", "schedule", "hypervolume"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 1000
    keys, places = Keys(1), torch.arange(2)
    cond = module.encode(["red square", "two"])
    knee = module.sample(cond, keys, places)
    plain = method(source)
    plain.configure_model()
    untouched = plain.sample(cond, keys, places)
    assert not torch.equal(knee, untouched)
    chosen = method(source, schedule=str(tmp_path / "run/front.json"))
    chosen.configure_model()
    assert torch.equal(chosen.sample(cond, keys, places), knee)
    module.export(tmp_path / "out", [])
    assert Schedule.load(tmp_path / "out/schedules/knee.json").steps == 4
    assert (tmp_path / "out/model_index.json").is_file() and (tmp_path / "out/front.json").is_file()


def test_flux_is_searched_and_compared_with_stock_caches(tmp_path: Path) -> None:
    module = method(pipeline(tmp_path / "flux", "flux"), guidance=1.0)
    fit(tmp_path / "run", module, 1, ends=True)
    found = json.loads((tmp_path / "run/front.json").read_text())["baselines"]
    assert "TGATE" not in found
    for name in ("first block 0.1", "TaylorSeer 3"):
        assert 0 < found[name]["relative_macs"] <= 1
    z = torch.randn(2, 4, 8, 8)
    cond = module.encode(["red", "blue"])
    after = module.sampler.pictures(z, cond)
    fresh = method(str(tmp_path / "flux"), guidance=1.0)
    fresh.configure_model()
    assert torch.equal(after, fresh.sampler.pictures(z, cond))


def test_options_of_the_search_change_it(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    populations, archives = {}, {}
    variants: dict[str, dict[str, Any]] = {
        "default": {},
        "seed": {"seed": 1},
        "random": {"search": {"initial": "random"}},
        "crossover": {"search": {"crossover": 0.0}},
        "cuts": {"search": {"cuts": 1}},
        "mutate": {"search": {"mutate": 1.0}},
        "bit": {"search": {"mutate": 1.0, "mutate_bit": 0.3}},
        "first step": {"search": {"fix_first_step": False}},
    }
    for name, options in variants.items():
        module = method(source, **options)
        fit(tmp_path / name, module, 2)
        search = module.progress.search
        populations[name] = np.packbits(search.ask()).tobytes()
        archives[name] = module.progress.archive
    assert len(set(populations.values())) == len(variants)
    first = archives["default"].front()[0]
    front = tmp_path / "default/front.json"
    warm = method(source, search={"initial": str(front)})
    fit(tmp_path / "warm", warm, 1)
    assert first in warm.progress.archive.facts


def test_schedules_are_evaluated_once_and_poor_ones_in_part(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    asked: dict[bool, list[int]] = {}
    for memoise in (True, False):
        module = method(source, search={"memoise": memoise, "race": False, "mutate": 0.0})
        counts = asked[memoise] = []
        module.configure_model()
        module.open()
        module.progress.anchors = (0.0, -1.0)
        schedules = module.progress.schedules(module.progress.search.ask())
        module.progress.evaluate(
            module.progress.new(schedules),
            lambda s, jobs, c=counts: (c.append(len(s)), np.zeros((len(s), 8)))[1],
            8,
            8,
            0,
        )
        counts.append(len(module.progress.new(schedules)))
    assert asked[True] == [6, 0] and asked[False] == [6, 6]
    module = method(source)
    module.configure_model()
    progress = module.open().progress
    cheap, dear, close = sorted(progress.schedules(progress.search.ask())[:3], key=progress.macs)
    ranges: list[Any] = []

    def measure(values: dict[bytes, float]) -> Any:
        def found(schedules: Any, jobs: range | None = None) -> np.ndarray:
            ranges.append((len(schedules), jobs))
            rows = np.array([np.arange(8) * 0.01 + values[s.key] for s in schedules])
            mask = np.isin(np.arange(8), range(8) if jobs is None else jobs)
            return np.where(mask, rows, 0.0)

        return found

    noise = {cheap.key: 1.0, dear.key: 0.0, close.key: 1.5}
    progress.evaluate([cheap], measure(noise), 4, 8, 0)
    progress.evaluate([dear, close], measure(noise), 4, 8, 1)
    facts = progress.archive.facts
    assert ranges == [(1, None), (2, range(4)), (1, range(4, 8))]
    assert facts[dear.key][2] == 0.0 and facts[dear.key][0] == pytest.approx(0.035)
    assert facts[close.key][2] == 1.0 and progress.archive.front() == [cheap.key, close.key]


def test_held_out_pictures_are_judged(tmp_path: Path) -> None:
    module = method(pipeline(tmp_path / "pipeline"))
    trainer = fit(tmp_path / "run", module, 1, val_check_interval=1, check_val_every_n_epoch=None)
    seen = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    assert {"val/no_cache", "val/knee", "val/knee/closeness"} <= seen.keys() and seen["val/knee/closeness"] < 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 1}, "steps is too small"),
        ({"seeds": 0}, "seeds is too small"),
        ({"micro_batch": 0}, "micro_batch is too small"),
        ({"search": {"population": 1}}, "at least two"),
        ({"search": {"mutate": 1.5}}, "Not a probability"),
        ({"search": {"cuts": 0}}, "needs a cut"),
    ],
)
def test_settings_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        method("assets/tiny/pixart", **options)


def test_accumulation_is_refused() -> None:
    from lightning_modules.ecad import ECAD

    with pytest.raises(UserError, match="one training step"):
        ECAD("assets/tiny/pixart", common=MethodOptions(accumulate=2))


def test_other_networks_and_batches_are_refused(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    with pytest.raises(UserError, match="every prompt with every seed"):
        caching.trainer_for(tmp_path, 1).fit(method(source), caching.data(tmp_path, batch=6))
    unet = method(str(tmp_path / "unet"))
    tiny_networks.pipeline_folder(tmp_path / "unet", "unet_text")
    unet.configure_model()
    with pytest.raises(UserError, match="PixArt and FLUX"):
        unet.open()
    network = denoiser("pixart")
    network.backbone.transformer_blocks[0].set_chunk_feed_forward(2)
    with pytest.raises(UserError, match="chunked"):
        Layout.of(network.backbone)


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    saves = Checkpoints(tmp_path / "run/checkpoints", CheckpointOptions(every=1))
    fit(tmp_path / "run", method(source), 1, callbacks=[saves])
    changed: list[dict[str, Any]] = [{"guidance": 2.0}, {"embedded_guidance": 1.0}, {"text_length": 7}]
    for options in changed:  # each changes the pictures that schedules are judged by
        with pytest.raises(UserError, match="another search"):
            fit(tmp_path / "run", method(source, **options), 2, resume=newest(tmp_path / "run/checkpoints"))


def test_schedules_of_others_are_refused_before_sampling(tmp_path: Path) -> None:
    layout = Layout.of(denoiser("flux").backbone)
    random_schedule(layout, 0).save(tmp_path / "flux.json")
    module = method(pipeline(tmp_path / "pipeline"), schedule=str(tmp_path / "flux.json"))
    module.configure_model()
    with pytest.raises(UserError, match="other blocks"):
        module.sample(module.encode(["red"]), Keys(0), torch.arange(1))
    with pytest.raises(UserError, match="no such schedule"):
        Schedule.load(tmp_path / "none.json")


def test_processes_that_disagree_stop(tmp_path: Path, monkeypatch: Any) -> None:
    module = method(pipeline(tmp_path / "pipeline"))
    monkeypatch.setattr(module, "gathered", lambda rows: torch.cat([rows, rows + 1]))
    with pytest.raises(RuntimeError, match="disagree"):
        module.agree(np.ones((2, 8), bool))
    assert DDPM.name != RectifiedFlow.name

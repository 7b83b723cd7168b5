"""The cached list of leaves is at every step what walking the whole state would give."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckpt
from ckpt.errors import UsageError
from ckpt.roll import Called, Roll
from ckpt.state import Leaves, TensorLeaf, collect

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
CHECK = settings(max_examples=100, deadline=None, derandomize=True)


class Loader:
    """A `Stateful` with values and tensors; its tensors are other objects each time, or always the same."""

    def __init__(self, kept: bool = False) -> None:
        self.at, self.kept, self.order = 0, kept, torch.arange(5)
        self.more: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        order = self.order if self.kept else self.order.clone()
        return {"at": self.at, "order": order, "deep": {"seen": [self.at, order + 1]}, **self.more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Job:
    """A state of everything, and what may become of it. `changes` keep its leaves, `rebuilds` may not."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        self.model[2][1].weight = self.model[2][0].weight  # tied
        self.other = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
        self.state: dict[str, Any] = {
            "model": self.model,
            "other": self.other,
            "loader": Loader(),
            "kept": Loader(kept=True),
            "rng": ckpt.RNG(),
            "note": 0,
            "nested": {
                "x": torch.zeros(3),
                "more": [torch.ones(2), 5, {"y": torch.eye(2)}],
                "pair": (1, torch.ones(1)),
            },
            "values": {"a": 1.5, "b": [1, 2, 3], "c": ckpt.PerRank("mine"), "d": ckpt.Replicated([1])},
            "mine": ckpt.PerRank({"z": torch.ones(2), "n": 3}),
        }
        self.renew()

    def renew(self) -> None:
        """Optimizers that know the parameters of now and have no state yet."""
        self.state["adam"] = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state["sgd"] = torch.optim.SGD(self.other.parameters(), lr=0.1, momentum=0.9)
        self.state["scheduler"] = torch.optim.lr_scheduler.StepLR(self.state["adam"], 1, 0.5)

    @property
    def modules(self) -> list[nn.Module]:
        return [m for root in (self.model, self.other) for m in root.modules() if m._parameters]

    def gradients(self) -> None:
        for p in (*self.model.parameters(), *self.other.parameters()):
            p.grad = torch.full_like(p, 0.5) if p.requires_grad else None

    # What keeps the leaves.

    def values_in_place(self, pick: random.Random) -> None:
        with torch.no_grad():
            pick.choice(list(self.model.parameters())).add_(pick.random())
            pick.choice(list(self.model.buffers())).add_(1)
            self.state["nested"]["x"].add_(pick.random())

    def learning_rate(self, pick: random.Random) -> None:
        pick.choice(self.state["sgd"].param_groups)["lr"] = pick.random()

    def schedule(self, pick: random.Random) -> None:
        self.state["scheduler"].step()

    def note(self, pick: random.Random) -> None:
        self.state["note"] = pick.choice([pick.random(), 1, 1.0, True, "text", None, [1, {"a": 2}], (1, 2)])
        self.state["values"]["b"] = [pick.random()]
        self.state["values"]["c"] = pick.choice([ckpt.PerRank, ckpt.Replicated])(pick.random())

    def draw(self, pick: random.Random) -> None:
        torch.rand(1)
        random.random()

    def load_data(self, pick: random.Random) -> None:
        for name in ("loader", "kept"):
            self.state[name].at += 1
        self.state["loader"].order = torch.randperm(5)
        self.state["kept"].order.add_(1)

    def another_loader(self, pick: random.Random) -> None:
        self.state["loader"] = Loader()

    def freeze(self, pick: random.Random) -> None:
        p = pick.choice(list(self.model.parameters()))
        p.requires_grad_(not p.requires_grad)

    def forget_gradients(self, pick: random.Random) -> None:
        for name in ("adam", "sgd"):
            self.state[name].zero_grad()

    # What may not.

    def step(self, pick: random.Random) -> None:
        self.gradients()
        self.state[pick.choice(["adam", "sgd"])].step()

    def replace_parameter(self, pick: random.Random) -> None:
        module = pick.choice(self.modules)
        name = pick.choice([n for n, p in module._parameters.items() if p is not None])
        setattr(module, name, nn.Parameter(torch.rand_like(module._parameters[name])))  # type: ignore[arg-type]
        self.renew()

    def swap_data(self, pick: random.Random) -> None:
        p = pick.choice(list(self.model.parameters()))
        p.data = torch.rand_like(p)

    def swap_dtype(self, pick: random.Random) -> None:
        p = pick.choice(list(self.other.parameters()))
        p.grad = None
        p.data = p.data.to(torch.float64 if p.dtype == torch.float32 else torch.float32)
        self.renew()

    def swap_moment(self, pick: random.Random) -> None:
        states = list(self.state["adam"].state.values())
        if states:
            state = pick.choice(states)
            state["exp_avg"] = state["exp_avg"] + 1

    def tie(self, pick: random.Random) -> None:
        a, b = self.model[2][0], self.model[2][1]
        b.weight = a.weight if b.weight is not a.weight else nn.Parameter(a.weight.detach().clone())
        self.renew()

    def remove_bias(self, pick: random.Random) -> None:
        linear = pick.choice([m for m in self.modules if isinstance(m, nn.Linear)])
        linear.bias = None if linear.bias is not None else nn.Parameter(torch.zeros(linear.out_features))
        self.renew()

    def add_module(self, pick: random.Random) -> None:
        name = f"m{pick.randrange(4)}"
        if name in self.other:
            del self.other[name]
            self.renew()
        else:
            self.other[name] = nn.Linear(2, pick.randint(1, 3))
            if pick.random() < 0.5:
                self.state["sgd"].add_param_group({"params": list(self.other[name].parameters()), "lr": 0.3})

    def add_buffer(self, pick: random.Random) -> None:
        module, name = pick.choice(self.modules), f"buffer{pick.randrange(2)}"
        if name in module._buffers:
            delattr(module, name)
        else:
            module.register_buffer(name, torch.rand(2), persistent=pick.random() < 0.7)

    def replace_buffer(self, pick: random.Random) -> None:
        module, name = self.some_buffer(pick)
        setattr(module, name, torch.rand(4))

    def swap_buffer_data(self, pick: random.Random) -> None:
        module, name = self.some_buffer(pick)
        module._buffers[name].data = torch.rand(4)  # type: ignore[union-attr]

    def rename_buffer(self, pick: random.Random) -> None:
        module, name = self.some_buffer(pick)
        other = "else" if "else" not in module._buffers else "running_mean"
        module._buffers = {other if n == name else n: b for n, b in module._buffers.items()}

    def pass_over_buffer(self, pick: random.Random) -> None:
        module, name = self.some_buffer(pick)
        module._non_persistent_buffers_set ^= {name}

    def some_buffer(self, pick: random.Random) -> tuple[nn.Module, str]:
        """Of those with four numbers."""
        norm = self.model[1]
        return norm, pick.choice([n for n, b in norm._buffers.items() if b is not None and b.numel() == 4])

    def add_hyper(self, pick: random.Random) -> None:
        pick.choice(self.state["sgd"].param_groups)[f"h{pick.randrange(3)}"] = pick.random()

    def regroup(self, pick: random.Random) -> None:
        first = self.state["sgd"].param_groups[0]
        if len(first["params"]) > 1:
            p = first["params"].pop()
            self.state["sgd"].add_param_group({"params": [p], "lr": 0.7})

    def load_optimizer(self, pick: random.Random) -> None:
        self.state["adam"].load_state_dict(self.state["adam"].state_dict())

    def add_key(self, pick: random.Random) -> None:
        name = f"k{pick.randrange(3)}"
        if name in self.state["nested"]:
            del self.state["nested"][name]
        else:
            self.state["nested"][name] = pick.choice([torch.rand(2), 3, Loader(), {}, {"a": 1}, [torch.ones(1)]])

    def replace_tensor(self, pick: random.Random) -> None:
        self.state["nested"]["x"] = torch.rand(pick.choice([3, 3, 4]))
        self.state["nested"]["more"][0] = torch.rand(2)

    def append(self, pick: random.Random) -> None:
        more = self.state["nested"]["more"]
        more.append(torch.rand(1)) if len(more) < 6 else more.pop()

    def order_of_keys(self, pick: random.Random) -> None:
        self.state = dict(pick.sample(list(self.state.items()), len(self.state)))

    def swap_models(self, pick: random.Random) -> None:
        if "other" in self.state:
            self.state["model"], self.state["other"] = self.state["other"], self.state["model"]

    def lose_the_model(self, pick: random.Random) -> None:
        """Without it the optimizer's parameters have no names: an error, until it is back."""
        if "other" in self.state:
            del self.state["other"]
        else:
            self.state["other"] = self.other

    changes = (
        values_in_place,
        learning_rate,
        schedule,
        note,
        draw,
        load_data,
        another_loader,
        freeze,
        forget_gradients,
    )
    rebuilds = (
        step, replace_parameter, swap_data, swap_dtype, swap_moment, tie, remove_bias, add_module, add_buffer, replace_buffer,
        swap_buffer_data, rename_buffer, pass_over_buffer, add_hyper,
        regroup, load_optimizer, add_key, replace_tensor, append, order_of_keys, swap_models, lose_the_model,
    )  # fmt: skip


def check(called: Called, state: Any, before: Leaves | None) -> None:
    """The same as a walk over everything, and told rightly how it differs from before."""
    wanted, again, got = collect(state), collect(state), called.leaves
    assert got.tensors.keys() == wanted.tensors.keys()
    assert got.objects == wanted.objects and got.aliases == wanted.aliases
    for name, leaf in wanted.tensors.items():
        same(name, got.tensors[name], leaf)
        if where(leaf) == where(again.tensors[name]):  # not made anew each time that a `Stateful` is asked
            assert where(got.tensors[name]) == where(leaf), f"{name} is read from where it was"
    if called.whole:
        assert called.fresh == frozenset()
    else:
        assert before is not None
        assert called.fresh == {n for n, leaf in got.tensors.items() if leaf is not before.tensors[n]}


def where(leaf: TensorLeaf) -> list[int]:
    return [view.data_ptr() for _, view in leaf.held.pieces]


def same(name: str, got: TensorLeaf, wanted: TensorLeaf) -> None:
    a, b = got.held, wanted.held
    assert (a.dtype, a.shape, a.kind, a.scope, a.replica, a.layout) == (
        b.dtype, b.shape, b.kind, b.scope, b.replica, b.layout,
    ), name  # fmt: skip
    assert [box for box, _ in a.pieces] == [box for box, _ in b.pieces]
    for (_, x), (_, y) in zip(a.pieces, b.pieces, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


Act = tuple[Callable[[Job, random.Random], None], int, bool]


def acts(from_: tuple[Callable[[Job, random.Random], None], ...]) -> st.SearchStrategy[list[Act]]:
    return st.lists(st.tuples(st.sampled_from(from_), st.integers(0, 1 << 16), st.booleans()), max_size=12)


@CHECK
@given(acts(Job.changes + Job.rebuilds))
def test_any_sequence_of_changes(sequence: list[Act]) -> None:
    job, roll = Job(), Roll()
    before: Leaves | None = None
    quiet = False  # nothing but values changed since the last call
    for act, seed, look in [*sequence, (Job.draw, 0, True), (Job.draw, 0, True)]:
        act(job, random.Random(seed))
        quiet = quiet and act in Job.changes
        if not look:
            continue
        try:
            called = roll.call(job.state)
        except UsageError:
            with pytest.raises(UsageError):
                collect(job.state)
            quiet = False
            continue
        check(called, job.state, before)
        assert not (quiet and called.whole), "called over again for nothing"
        before, quiet = called.leaves, True


@CHECK
@given(acts(Job.changes), st.integers(1, 3))
def test_values_alone_never_take_a_whole_walk(sequence: list[Act], steps: int) -> None:
    job, roll = Job(), Roll()
    for _ in range(steps):
        job.gradients()
        job.state["adam"].step()
        job.state["sgd"].step()
    before = roll.call(job.state).leaves
    names = {"loader.order", "loader.deep.seen.1", "kept.order", "kept.deep.seen.1"}
    for act, seed, train in sequence:
        act(job, random.Random(seed))
        if train:
            for p in job.model.parameters():
                p.grad = torch.ones_like(p) if p in job.state["adam"].state else None
            job.state["adam"].step()
        called = roll.call(job.state)
        check(called, job.state, before)
        assert not called.whole and called.fresh == names
        before = called.leaves


@CHECK
@given(acts(Job.changes + Job.rebuilds), st.booleans())
def test_what_is_not_looked_at_now_is_confirmed_later(sequence: list[Act], trained: bool) -> None:
    """What was confirmed is what a walk over everything gives; what was not is right at the next call."""
    job, roll = Job(), Roll()
    if trained:
        job.gradients()
        for name in ("adam", "sgd"):
            job.state[name].step()
    before: Leaves | None = None
    for act, seed, look in [*sequence, (Job.draw, 0, True)]:
        act(job, random.Random(seed))
        if not look:
            continue
        try:
            called = roll.call(job.state, later=True)
            if called.confirm is not None and not called.confirm():
                before = called.leaves
                called = roll.call(job.state, later=True)
                assert called.confirm is None
        except UsageError:
            with pytest.raises(UsageError):
                collect(job.state)
            continue
        check(called, job.state, before)
        before = called.leaves


def test_training_is_confirmed_and_replaced_tensors_are_not() -> None:
    job, roll = Job(), Roll()
    for name in ("adam", "sgd"):
        job.gradients()
        job.state[name].step()
    roll.call(job.state)
    for _ in range(3):
        job.state["adam"].step()
        called = roll.call(job.state, later=True)
        assert called.confirm is not None and called.confirm()
    job.swap_data(random.Random(0))
    called = roll.call(job.state, later=True)
    assert called.confirm is not None and not called.confirm()
    assert roll.call(job.state, later=True).confirm is None  # and for a while


def walked(state: Any, *changes: Callable[[], Any]) -> list[bool]:
    """Whether the call after each change was a whole walk; all of them give the right leaves."""
    roll = Roll()
    before: Leaves | None = None
    out = []
    for change in (lambda: None, *changes):
        change()
        called = roll.call(state)
        check(called, state, before)
        before = called.leaves
        out.append(called.whole)
    return out[1:]


def nothing() -> None:
    pass


def test_the_first_call_and_a_state_that_does_not_change() -> None:
    assert walked({"x": torch.ones(3), "n": 1}, nothing, nothing) == [False, False]
    assert walked({}, nothing) == [False]
    with pytest.raises(UsageError, match="a state is a dict"):
        Roll().call(5)


def test_momentum_that_comes_with_the_second_step() -> None:
    model = nn.Linear(3, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        sgd.step()

    assert walked({"model": model, "sgd": sgd}, nothing, step, step, step) == [False, True, False, False]


class Counting(torch.optim.SGD):
    """An optimizer that counts in plain numbers, as many do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["rms"] = 0.5 * state["step"]
        return super().step(closure)


def test_plain_numbers_in_the_state_of_an_optimizer_are_values() -> None:
    model = nn.Linear(3, 3)
    optimizer = Counting(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    assert not any(walked(state, optimizer.step, optimizer.step, optimizer.step))  # values are in no plan


def test_numbers_that_are_equal_and_not_the_same() -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def put(value: Any) -> Callable[[], None]:
        return lambda: optimizer.state[model.weight].update(x=value)

    walked(
        {"m": model, "o": optimizer}, *(put(v) for v in (0, 0.0, -0.0, False, 1, True, 1.0, "1", None, float("nan")))
    )


def test_lists_in_the_state_of_an_optimizer() -> None:
    """As L-BFGS has them: what is in them is not looked at, so every call walks."""
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["old"] = [1]
    walked({"m": model, "o": optimizer}, lambda: optimizer.state[model.weight]["old"].append(2))


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "other shape": lambda t: t.view(2, 8),
    "transposed": lambda t: t.t(),
    "other dtype": lambda t: t.view(torch.int32),
    "flat": lambda t: t.view(16),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("where", ["tensor", "parameter", "buffer"])
def test_the_same_memory_seen_in_another_way(name: str, where: str) -> None:
    tensor = torch.arange(16.0).view(4, 4)
    module = nn.Module()
    if where == "parameter":
        module.x = nn.Parameter(tensor, requires_grad=False)
        tensor = module.x
    elif where == "buffer":
        module.register_buffer("x", tensor)
    state = {"part": tensor} if where == "tensor" else {"part": module}

    def turn() -> None:
        tensor.data = VIEWS[name](tensor.data)

    walked(state, turn)


def test_turned_around_in_place() -> None:
    tensor = torch.arange(16.0).view(4, 4)
    walked({"x": tensor}, lambda: tensor.t_(), lambda: tensor.unsqueeze_(0), lambda: tensor.squeeze_(0))


def test_a_buffer_that_is_no_longer_persistent() -> None:
    module = nn.BatchNorm1d(3)
    mean = module.running_mean
    walked({"m": module}, lambda: module.register_buffer("running_mean", mean, persistent=False))


@pytest.mark.parametrize("name", ["value", "tensor"])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_stateful_that_says_less_than_before(name: str, calls: int) -> None:
    loader = Loader()
    loader.more = {"value": 1, "tensor": torch.ones(2)}
    walked({"loader": loader}, *[nothing] * calls, lambda: loader.more.pop(name), nothing)


def test_a_stateful_whose_tensors_are_others_is_walked_once() -> None:
    loader = Loader()
    state = {"loader": loader}

    def grow() -> None:
        loader.more["tensor"] = torch.ones(2)

    assert walked(state, nothing, grow, nothing, nothing) == [False, True, False, False]

    def reshape() -> None:
        loader.more["tensor"] = torch.ones(3)

    assert walked(state, nothing, reshape, nothing) == [False, True, False]
    assert walked(state, nothing, loader.more.clear, nothing, nothing) == [False, True, False, False]


def test_a_stateful_that_goes() -> None:
    state = {"a": Loader(), "b": Loader()}
    assert walked(state, nothing, lambda: state.pop("a"), nothing, nothing) == [False, True, False, False]


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": self.weight.sum().item()}

    def set_extra_state(self, state: Any) -> None:
        raise NotImplementedError


def test_extra_state_is_asked_for_each_time() -> None:
    module = WithExtra(2, 2)
    walked({"m": module}, lambda: nn.init.ones_(module.weight), nothing)


def test_declared_pieces_are_the_same_from_step_to_step() -> None:
    tensor = torch.ones(4)
    state = {"x": ckpt.Shard(tensor, (8,), (4,)), "n": 1}
    assert walked(state, lambda: tensor.add_(1), nothing) == [False, False]


def test_tensors_that_are_gone_do_not_come_back() -> None:
    """No new tensor is taken for an old one that had its address."""
    state = {"x": torch.full((1000,), -1.0)}
    roll = Roll()
    roll.call(state)
    for i in range(50):
        state["x"] = torch.full((1000,), float(i))
        called = roll.call(state)
        assert float(called.leaves.tensors["x"].held.pieces[0][1][0]) == i


@pytest.fixture
def alone() -> Iterator[Any]:
    """A mesh of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors(alone: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = nn.Linear(4, 4)
    for name, placement in (("weight", Shard(0)), ("bias", Replicate())):
        whole = distribute_tensor(getattr(model, name).detach(), alone, [placement])
        setattr(model, name, nn.Parameter(whole))
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    loose = {"x": distribute_tensor(torch.arange(6.0), alone, [Shard(0)])}

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        adam.step()

    def replace() -> None:
        loose["x"] = distribute_tensor(torch.arange(8.0), alone, [Replicate()])

    def in_place() -> None:
        model.weight._local_tensor.detach().add_(1)  # type: ignore[operator]

    state = {"model": model, "adam": adam, "loose": loose}
    assert walked(state, nothing, step, step, in_place, replace, nothing) == [False, True, False, False, True, False]

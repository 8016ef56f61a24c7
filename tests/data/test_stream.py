"""Streams resume bitwise, do not know of ranks and workers, and each document belongs to one of them."""

import copy
import gc
import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.data import Loader, MixedSource, Mixture, TokenStream
from k25sys.data.permutation import Permutation
from k25sys.errors import ArgumentTypeError, ArgumentValueError, DataError, DataWorkerError
from tests.data.toy_sources import (
    BrokenSource,
    PrintedSource,
    ToySource,
    document_of,
    plain,
    text_sources,
    toy_mixture,
    toy_streams,
    until_error,
    vision_sources,
)


@given(st.integers(1, 200), st.text(max_size=5))
def test_a_permutation_has_each_element_once(size, key) -> None:
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_permutations_look_random_and_need_no_array() -> None:
    orders = Counter(tuple(map(Permutation(4, f"key {i}"), range(4))) for i in range(2400))
    assert len(orders) == 24
    assert all(60 < count < 140 for count in orders.values())
    large = Permutation(10**15, "large")
    images = [large(place) for place in range(1000)]
    assert len(set(images)) == 1000
    assert 0.45 < sum(images) / 1000 / 10**15 < 0.55
    steps = [abs(b - a) for a, b in itertools.pairwise(images)]
    assert 0.28 < sum(steps) / 999 / 10**15 < 0.39  # of independent uniform numbers: 1/3


def test_orders_differ_by_epoch_seed_and_source() -> None:
    def order(seed: int, number: int, epoch: int) -> list[int]:
        source = ToySource(number, [49] * 20)
        (stream,) = toy_streams(Mixture([MixedSource(source, 1.0)]), [0], 1, seed=seed)
        firsts = [document_of(int(stream.next().input_ids_T[0])) for _ in range(20 * (epoch + 1))]
        return [index for _, of_epoch, index, _ in firsts if of_epoch == epoch]

    orders = [order(5, 0, 0), order(5, 0, 1), order(6, 0, 0), order(5, 1, 0), list(range(20))]
    assert all(sorted(found) == list(range(20)) for found in orders)
    assert len(set(map(tuple, orders))) == 5


@settings(max_examples=25)
@given(
    text_sources(0),
    text_sources(1),
    vision_sources(2),
    st.sampled_from([(None, 0.0), (0.3, 0.0), (0.2, 0.5)]),
    st.sampled_from([None, 2]),
    st.integers(0, 2),
)
def test_resumed_at_every_point_it_goes_on_bitwise(text, more, vision, shares, max_epochs, number) -> None:
    sources = [MixedSource(text, 1.0), MixedSource(more, 0.7, max_epochs, 0.3), MixedSource(vision, 1.0)]
    mixture = Mixture(sources, vision_budget=shares[0], inject=shares[1])
    settings = {"numbers": [number], "of": 3, "num_sequences": 3 * 16}
    (stream,) = toy_streams(mixture, **settings)
    states, sequences = [json.dumps(stream.state())], []
    for _ in range(16):
        sequences.append(plain(stream.next()))
        states.append(json.dumps(stream.state()))
    (other,) = toy_streams(mixture, **settings)
    for point in reversed(range(16)):
        other.restore(json.loads(states[point]))
        assert json.dumps(other.state()) == states[point]
        for step in range(point, min(point + 4, 16)):
            assert plain(other.next()) == sequences[step]
            assert json.dumps(other.state()) == states[step + 1]


def test_a_state_is_not_changed_by_what_follows() -> None:
    (stream,) = toy_streams(toy_mixture(), [1], 2)
    stream.next()
    state = stream.state()
    before = copy.deepcopy(state)
    stream.next()
    assert state == before


FOREIGN = {
    "weight": (toy_mixture(vision_budget=0.1), {}, "vision_budget"),
    "injection": (toy_mixture(inject=0.5), {}, "inject"),
    "sources": (Mixture([MixedSource(ToySource(0, [7]), 1.0)]), {}, "vision_budget"),
    "fewer sources": (Mixture(toy_mixture().sources[:3], vision_budget=0.2, inject=0.25), {}, "sources"),
    "longer run": (toy_mixture(), {"num_sequences": 400}, "inject"),
    "seed": (toy_mixture(), {"seed": 6}, "seed"),
    "length": (toy_mixture(), {"sequence_length": 64}, "sequence_length"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_state_is_refused(case) -> None:
    mixture, options, says = FOREIGN[case]
    (stream,) = toy_streams(toy_mixture(), [0], 2)
    stream.next()
    (other,) = toy_streams(mixture, [0], 2, **options)
    before = other.state()
    with pytest.raises(DataError, match=f"TokenStream.restore: {says}: got .*another run"):
        other.restore(stream.state())
    assert other.state() == before


def test_another_streams_state_and_damaged_ones_are_refused() -> None:
    stream, other = toy_streams(toy_mixture(), [0, 1], 2)
    for _ in range(20):
        stream.next()
    good = stream.state()
    assert good["held"]
    with pytest.raises(DataError, match="number: got 0, accepted 1"):
        other.restore(good)

    def set_in(*path, to):
        state = json.loads(json.dumps(good))
        inner = state
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = to
        return state

    group, held = next(iter(good["held"].items()))
    damaged = [
        {},
        None,
        {**good, "held": {group: {**held, "offset": 5000}}},
        {**good, "held": {group: {**held, "source": "toy9"}}},
        {**good, "held": {group: {**held, "index": 77}}},
        {name: value for name, value in good.items() if name != "sources"},
        set_in("sources", "toy0", "position", to=good["sources"]["toy0"]["position"] + 1),
        set_in("sources", "toy0", "epoch", to=-1),
        set_in("sequences", to="3"),
        set_in("vision_deficit", to=None),
        set_in("vision_deficit", to="much"),
        set_in("vision_deficit", to=float("nan")),
        set_in("sources", "toy1", "deficit", to=[]),
    ]
    for state in damaged:
        with pytest.raises(DataError, match=r"TokenStream\.restore"):
            stream.restore(state)
        assert stream.state() == good


def printed(fingerprint: str, lengths: tuple[int, ...] = (30, 9)) -> TokenStream:
    sources = [ToySource(0, [20, 30]), PrintedSource(1, lengths, fingerprint)]
    (stream,) = toy_streams(Mixture([MixedSource(source, 1.0) for source in sources]), [0], 1)
    return stream


def test_a_source_whose_files_changed_is_named() -> None:
    stream = printed("abc")
    stream.next()
    state = json.loads(json.dumps(stream.state()))
    same = printed("abc")
    same.restore(state)
    assert plain(same.next()) == plain(stream.next())
    for other in (printed("abd"), printed("abd", (30, 9, 7)), printed("")):
        before = other.state()
        says = r"restore: fingerprint of source 'toy1': got 'abc', accepted '(abd)?'; its files changed since .* anew"
        with pytest.raises(DataError, match=says):
            other.restore(state)
        assert other.state() == before
    with pytest.raises(DataError, match=r"TokenStream\.restore: sources: got .*another run"):
        printed("abc", (30, 9, 7)).restore(state)


def test_a_state_that_says_nothing_of_files_is_refused() -> None:
    stream = printed("abc")
    says = r"fingerprint of source 'toy1': got none in this state, accepted 'abc'; whether its files changed .* told"
    for old in (None, ""):
        state = stream.state()
        for entry in state["stream"]["sources"]:
            entry["fingerprint"] = old
            if old is None:
                del entry["fingerprint"]
        with pytest.raises(DataError, match=says if old == "" else "fingerprint of source 'toy0': got none"):
            stream.restore(state)
    for damaged in (None, 3, "sources", [None], [["name"]], [{"name": []}], {"name": "toy1"}):
        state = stream.state()
        state["stream"]["sources"] = damaged
        with pytest.raises(DataError, match=r"TokenStream\.restore: sources: got"):
            stream.restore(state)


def test_a_run_without_injection_may_be_made_longer() -> None:
    mixture = Mixture([MixedSource(ToySource(0, [30, 40, 9]), 1.0)])
    (short,), (longer,) = (toy_streams(mixture, [0], 1, num_sequences=n) for n in (10, 20))
    short.next()
    longer.restore(short.state())
    assert plain(longer.next()) == plain(short.next())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sequence_length": 0}, ArgumentValueError, "sequence_length"),
        ({"seed": 0.5}, ArgumentTypeError, "seed"),
        ({"num_sequences": 0}, ArgumentValueError, "num_sequences"),
        ({"pad": 1}, ArgumentValueError, "pad"),
    ],
)
def test_arguments_out_of_range(options, error, says) -> None:
    with pytest.raises(error, match=f"TokenStream: {says}"):
        toy_streams(toy_mixture(), [0], 1, **options)
    with pytest.raises(ArgumentValueError, match="number"):
        toy_streams(toy_mixture(), [2], 2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_batches_do_not_depend_on_the_number_of_ranks(ranks) -> None:
    of, steps = 6, 8
    mixture = toy_mixture()
    alone = Loader(toy_streams(mixture, range(of), of))
    wanted = [[plain(packed) for packed in alone.next_step()] for _ in range(steps)]
    each = of // ranks
    loaders = [Loader(toy_streams(mixture, range(r * each, (r + 1) * each), of)) for r in range(ranks)]
    for step in range(steps):
        assert [plain(packed) for loader in loaders for packed in loader.next_step()] == wanted[step]
        if step == 4:  # goes on with other ranks
            states = {number: state for loader in loaders for number, state in loader.state().items()}
            assert len(states) == of
            loaders = [Loader(toy_streams(mixture, [number], of)) for number in range(of)]
            for loader in loaders:
                loader.restore(json.loads(json.dumps(states)))
    with pytest.raises(DataError, match=r"none of the streams \[5\]"):
        loaders[5].restore({number: state for number, state in states.items() if number != "5"})


def test_workers_change_nothing_and_leave_nothing_behind() -> None:
    of = 3
    random = torch.get_rng_state()
    alone, ahead = (Loader(toy_streams(toy_mixture(), range(of), of), workers=workers) for workers in (0, 2))
    states, steps = [alone.state()], []
    for _ in range(6):
        steps.append(list(map(plain, alone.next_step())))
        assert list(map(plain, ahead.next_step())) == steps[-1]
        states.append(alone.state())
        assert ahead.state() == states[-1]
    for point in (3, 0):
        alone.restore(json.loads(json.dumps(states[point])))
        assert list(map(plain, alone.next_step())) == steps[point]
    assert len(multiprocessing.active_children()) == 2
    ahead.restore(states[2])
    assert multiprocessing.active_children() == []
    assert ahead.state() == states[2]
    assert torch.equal(torch.get_rng_state(), random)


def test_a_killed_worker_is_an_error_and_the_loader_can_go_on() -> None:
    loader, calm = (Loader(toy_streams(toy_mixture(), range(2), 2), workers=workers) for workers in (1, 0))
    loader.next_step()
    calm.next_step()
    (process,) = multiprocessing.active_children()
    os.kill(process.pid or 0, signal.SIGTERM)  # left to the main process
    os.kill(process.pid or 0, signal.SIGINT)
    assert list(map(plain, loader.next_step())) == list(map(plain, calm.next_step()))
    os.kill(process.pid or 0, signal.SIGKILL)
    read_before_death, error = until_error(loader.next_step)
    assert isinstance(error, DataWorkerError)
    assert "data worker 0: got killed by SIGKILL" in str(error)
    for step in read_before_death:
        assert list(map(plain, step)) == list(map(plain, calm.next_step()))
    assert loader.state() == calm.state()
    assert multiprocessing.active_children() == []
    assert list(map(plain, loader.next_step())) == list(map(plain, calm.next_step()))
    assert len(multiprocessing.active_children()) == 1
    del loader, error  # whose traceback holds the loader
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("workers", "numbers"), [(0, [0, 1]), (0, [1, 0]), (1, [0, 1])])
def test_an_error_of_a_source_comes_at_its_step_with_its_cause(workers, numbers) -> None:
    source = BrokenSource(3, [49] * 4)
    mixture = Mixture([MixedSource(source, 1.0)])
    loader = Loader(toy_streams(mixture, numbers, 2), workers=workers)
    steps, error = until_error(loader.next_step)
    assert len(steps) == 3
    assert isinstance(error, DataError)
    assert "'toy3', document 1, epoch 1: got FileNotFoundError: photo.jpg is gone" in str(error)
    assert "photo.jpg is gone" in str(error.__cause__)
    assert [state["sequences"] for state in loader.state().values()] == [3, 3]
    assert multiprocessing.active_children() == []
    if workers == 0:
        source.is_mended = True
        calm = Loader(toy_streams(mixture, numbers, 2))
        assert [list(map(plain, calm.next_step())) for _ in steps] == [list(map(plain, step)) for step in steps]
        assert list(map(plain, loader.next_step())) == list(map(plain, calm.next_step()))


def test_loaders_that_cannot_be() -> None:
    (stream,) = toy_streams(toy_mixture(), [0], 1)
    for streams, workers, says in (
        ([], 0, "streams"),
        ([stream, stream], 0, "all different"),
        ([stream], -1, "workers"),
    ):
        with pytest.raises(ArgumentValueError, match=f"Loader: {says}" if says != "all different" else says):
            Loader(streams, workers=workers)
    with pytest.raises(ArgumentTypeError, match="workers"):
        Loader([stream], workers=True)

    class Local(ToySource):
        pass

    loader = Loader(toy_streams(Mixture([MixedSource(Local(0, [40]), 1.0)]), [0], 1), workers=1)
    with pytest.raises(DataWorkerError, match="must be importable"):
        loader.next_step()

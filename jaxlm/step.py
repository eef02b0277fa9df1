"""The update: a pure step on logical shapes, and its compilation onto a mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxlm.config import Config
from jaxlm.losses import LossSums
from jaxlm.mesh import batch_shards
from jaxlm.models import lora
from jaxlm.models.build import make_model, param_shapes
from jaxlm.nn import moe
from jaxlm.nn.layers import Dropout
from jaxlm.parallel.pipeline import make_schedule
from jaxlm.parallel.ring import ring_order
from jaxlm.placement import place
from jaxlm.sharding import (
    Layout,
    axes_like,
    batch_sharding,
    make_layout,
    replicated_sharding,
    split_boxes,
)
from jaxlm.tasks.batch import Batch, batch_loss
from jaxlm.tasks.labels import LabelSums, label_sums
from jaxlm.xla import compiler_options

# Of a micro-batch on one CPU device: a model of 14M parameters takes nine tenths of the time that
# it takes with 2,048, and less than with 512.
CACHED_TOKENS = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run is; what is restored continues it exactly."""

    step: jax.Array
    """Updates tried, which is also the index of the next batch."""
    params: object
    """What trains: the model's parameters or, with `lora`, adapters and a new head."""
    opt_state: object
    ema: object
    """Exponential moving average of what trains, or None."""
    skipped: jax.Array
    """Updates skipped so far for a non-finite loss or gradient."""
    skipped_in_row: jax.Array
    """Updates skipped since the last one that was not."""
    frozen: object = None
    """The parameters that no update changes and no checkpoint holds; None: there are none."""


def init_state(params, optimizer, config: Config) -> TrainState:
    """The state before the first update."""
    zero = jnp.zeros((), jnp.int32)
    ema = None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, optimizer.init(params), ema, zero, zero)


def train_step(
    state: TrainState,
    batch: Batch,
    rate,
    *,
    model,
    optimizer,
    config: Config,
    micro_batches: int,
):
    """One update of the whole batch at a learning rate; returns (state, metrics), all scalars.

    The loss is a mean over the targets of the global batch, however it is split. A non-finite
    loss or gradient leaves everything but the counters as it was.
    """
    train = config.train
    targets = jnp.maximum(batch.weights.sum(), 1.0)
    tokens = jnp.maximum(jnp.sum(batch.segment_ids > 0), 1)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_fn(params, micro: Batch, places):
        dropout = Dropout(key, *places) if config.model.drops else None
        params = lora.attach(config.lora, state.frozen, params)
        total, sums, routed = batch_loss(model, params, micro, train, dropout)
        return total / targets + moe.auxiliary_loss(config.model, routed, tokens), (sums, routed)

    gradients, (sums, routed) = accumulate(
        jax.grad(loss_fn, has_aux=True), state.params, batch, micro_batches
    )
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: rate * u, updates))
    if config.lora is None:
        params = moe.balance(config.model, params, routed)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - config.optim.ema_decay)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums.nats)
    old = (state.params, state.opt_state, state.ema)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    params, opt_state, ema = jax.tree.map(keep, (params, opt_state, ema), old)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
    return state, {
        "loss": sums.nats / targets,
        "grad_norm": norm,
        "learning_rate": rate,
        "targets": sums.weight,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        **moe.metrics(config.model, routed, tokens),
    }


def eval_step(params, batch: Batch, *, model, config: Config) -> LossSums | LabelSums:
    """What validation adds up over batches."""
    batch = in_ring_order(batch)
    if config.model.labels is not None:
        return label_sums(model, params, batch)
    return batch_loss(model, params, batch, config.train, dropout=None)[1]


def accumulate(gradient: Callable, params, batch: Batch, count: int):
    """Sum `gradient(params, micro_batch, places)` over `count` micro-batches.

    Micro-batch i has rows i, i + count, ...: every device keeps the rows it holds. `places` are
    those of the tokens [B, T], and of the source's [B, S], in the batch. Each dp replica adds up
    its own gradients, over micro-batches and inside the model, and they are summed over replicas
    once.
    """
    read = (batch.tokens,) if batch.source is None else (batch.tokens, batch.source.tokens)
    places = tuple(jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) for x in read)
    batch, places = in_ring_order((batch, places))
    split = lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)  # noqa: E731
    micros = jax.tree.map(split, (batch, places))

    def add_up(params, micros):
        first = jax.tree.map(lambda x: x[0], micros)
        if count == 1:
            return gradient(params, *first)

        once = jax.jit(gradient)  # traced for its shapes, and not again for the loop

        def add(total, micro):
            return jax.tree.map(jnp.add, total, once(params, *micro)), None

        shapes = jax.eval_shape(once, params, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, micros)[0]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["dp"] == 1:
        summed = add_up(params, micros)
    else:
        summed = jax.shard_map(
            lambda params, micros: jax.lax.psum(add_up(params, micros), "dp"),
            in_specs=(PartitionSpec(), PartitionSpec(None, "dp")),
            out_specs=PartitionSpec(),
            axis_names={"dp"},
            check_vma=False,
        )(params, micros)
    # Or a GPU would stack the layers' gradients three times: for the parameters and both moments.
    on_gpu = jax.default_backend() == "gpu"
    return jax.lax.optimization_barrier(summed) if on_gpu else summed


def in_ring_order(tree):
    """Arrays [B, T] with columns in the order in which the mesh in force splits rows over cp."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["cp"] == 1:
        return tree
    return jax.tree.map(lambda x: x[:, ring_order(x.shape[1], mesh.shape["cp"])], tree)


@dataclasses.dataclass(frozen=True)
class Update:
    """`train_step`, compiled for a mesh at its first call.

    The learning rate is computed beside it, so that a compilation cache has it for all schedules.
    """

    compiled: Callable
    """(TrainState, Batch, rate) -> (TrainState, metrics); the state is donated."""
    rate: Callable
    """(step) -> rate, float32."""

    def __call__(self, state: TrainState, batch: Batch):
        return self.compiled(state, batch, self.rate(state.step))

    def lower(self, state: TrainState, batch: Batch):
        """As `jax.jit`'s, of arrays or their shapes."""
        return self.compiled.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run, each compiled at its first call, and how its state is stored."""

    mesh: Mesh
    layout: Layout
    saved: Layout
    """Of the state without what is frozen, as checkpoints hold it."""
    init: Callable
    """() -> TrainState, from the seed."""
    init_from: Callable
    """(the model's parameters in stored shapes) -> TrainState; the parameters are donated."""
    train_step: Update
    """(TrainState, Batch) -> (TrainState, metrics); the state is donated."""
    eval_step: Callable
    """(the model's parameters, Batch) -> LossSums, or LabelSums of a classifier."""
    eval_params: Callable
    """TrainState -> the model's parameters that stand for it: averaged if the run does, merged."""

    def put(self, batch: Batch, rows=None, count: int = 0) -> Batch:
        """A host batch on the devices; with `rows`, it is these of the global batch's `count`."""
        return place(batch, batch_sharding(self.mesh), rows, count)


def micro_batches(config: Config, mesh: Mesh) -> int:
    """In how many parts an update is computed on a mesh.

    Left open, it is one, but on CPUs a Transformer takes few tokens at a time: what a layer writes
    is then still in the cache when the next reads it, and a step needs less memory, which it gets
    from Linux anew. Not with parameters split over devices, who would gather them
    for each part.
    """
    if config.train.accumulation is not None:
        return config.train.accumulation
    whole = mesh.shape["fsdp"] == mesh.shape["ep"] == mesh.shape["pp"] == 1
    if not whole or config.model.is_recurrent or jax.default_backend() != "cpu":
        return 1
    rows = config.train.batch_size // batch_shards(mesh)
    fewest = -(-CACHED_TOKENS // config.tokens_per_row)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or rows // n >= fewest))


def build_model(config: Config, mesh: Mesh):
    """The model as it is trained on a mesh: with its pipeline."""
    rows = config.train.batch_size // micro_batches(config, mesh) // batch_shards(mesh)
    parallel = config.parallel
    schedule = make_schedule(mesh.shape["pp"], parallel.rounds, parallel.microbatches, rows)
    return make_model(config.model, schedule)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run's state is made of, and how its parts are stored on a mesh."""

    begin: Callable
    """(the model's parameters in logical shapes) -> TrainState, in logical shapes."""
    optimizer: optax.GradientTransformation
    state: Layout
    saved: Layout
    """Of the state without what is frozen."""
    params: Layout
    """Of the model's parameters."""


def plan_state(model, make_optimizer: Callable, config: Config, mesh: Mesh) -> Plan:
    """Plan what trains, what is frozen, and where all of it lies."""
    key = jax.random.key(config.seed)
    boxed = param_shapes(model.config)
    params, axes = split_boxes(boxed)
    draw = functools.partial(lora.init_adapters, config.lora, boxed, key)
    adapters, adapter_axes = split_boxes(jax.eval_shape(draw))
    optimizer = make_optimizer(lora.joined(lora.divide(config, axes)[0], adapter_axes))

    def begin(params):
        trained, frozen = lora.divide(config, params)
        trained = lora.joined(trained, split_boxes(draw())[0])
        return dataclasses.replace(init_state(trained, optimizer, config), frozen=frozen)

    logical = jax.eval_shape(begin, params)
    every, every_axes = lora.joined(params, adapters), lora.joined(axes, adapter_axes)
    state_axes = axes_like(logical, every, every_axes)
    place_all = functools.partial(
        make_layout, mesh=mesh, order=model.schedule.order(config.model.num_layers)
    )
    without = functools.partial(dataclasses.replace, frozen=None)
    return Plan(
        begin=begin,
        optimizer=optimizer,
        state=place_all(logical, state_axes),
        saved=place_all(without(logical), without(state_axes)),
        params=place_all(params, axes),
    )


def build_program(model, make_optimizer: Callable, schedule: Callable, config: Config, mesh: Mesh):
    """Lay the state out on the mesh and compile init, train and eval for it.

    `make_optimizer(axes)` gets the logical axes of the parameters that train.
    """
    plan = plan_state(model, make_optimizer, config, mesh)
    layout, params_layout, stored = plan.state, plan.params, plan.state.shardings
    everywhere, rows = replicated_sharding(mesh), batch_sharding(mesh)

    def initial():
        return layout.store(plan.begin(split_boxes(model.init(jax.random.key(config.seed)))[0]))

    def initial_from(params):
        return layout.store(plan.begin(params_layout.unstore(params)))

    def update(state, batch, rate):
        state, metrics = train_step(
            layout.unpad(state),
            batch,
            rate,
            model=model,
            optimizer=plan.optimizer,
            config=config,
            micro_batches=micro_batches(config, mesh),
        )
        return layout.pad(state), metrics

    def evaluate(params, batch):
        return eval_step(params_layout.unpad(params), batch, model=model, config=config)

    def merged(state):
        state = layout.unpad(state)
        return params_layout.pad(lora.merge(config.lora, state.frozen, _averaged(state)))

    def compiled(function, **options):
        return jax.jit(on_mesh(function, mesh), **options)

    return Program(
        mesh=mesh,
        layout=layout,
        saved=plan.saved,
        init=compiled(initial, out_shardings=stored),
        init_from=compiled(initial_from, out_shardings=stored, donate_argnums=0),
        train_step=Update(
            compiled(
                update,
                in_shardings=(stored, rows, everywhere),
                out_shardings=(stored, everywhere),
                donate_argnums=0,
                compiler_options=compiler_options(config.parallel.overlap),
            ),
            compiled(schedule, out_shardings=everywhere),
        ),
        eval_step=compiled(
            evaluate, in_shardings=(params_layout.shardings, rows), out_shardings=everywhere
        ),
        eval_params=_averaged
        if config.lora is None
        else compiled(merged, out_shardings=params_layout.shardings),
    )


def _averaged(state: TrainState):
    return state.params if state.ema is None else state.ema


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function` traced with `mesh` in force, for `sharding.constrain`."""

    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced

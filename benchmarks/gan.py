"""One-loss GAN training against alternating: FLOPs by XLA, and time for an update of both.

    python benchmarks/gan.py

Two pairs of networks: "layers", a generator of four and a discriminator of three equal layers,
where theory says 30 : 37 = 0.81, and "dcgan", the one of examples/gan.py. The alternating step
is an ordinary one: two gradients, two optimizers, new images for the generator. Both ways run
with the non-saturating loss and Adam, on one core, in turns. (Not hinge: its generator has a
constant cotangent, and XLA saves one product in the wide last layer of "layers".)
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from measure import cpu_ms, pin_to_one_core, report, take_turns

WIDTH, BATCH = 256, 256
CASES = {
    "TF graph": ("tensorflow", ""),
    "TF XLA": ("tensorflow", "--jit"),
    "JAX": ("jax", "--jit"),
}
WAYS = ("alternating", "single")


def main() -> None:
    arguments = parse()
    if arguments.way:
        pin_to_one_core()
        measure(arguments)
        return
    print("| networks | backend | alternating, ms | one loss, ms | ratio | ratio of FLOPs |")
    print("|---|---|---|---|---|---|")
    for networks in ("layers", "dcgan"):
        cases = {
            (name, way): (None, backend, ["--networks", networks, "--way", way, *flags.split()])
            for name, (backend, flags) in CASES.items()
            for way in WAYS
        }
        figures = take_turns(__file__, cases, arguments.rounds)
        for name in CASES:
            old, new = (figures[name, way] for way in WAYS)
            if not (old and new):
                continue
            flops = f"{new['flops'] / old['flops']:.2f}" if old["flops"] else ""
            print(
                f"| {networks} | {name} | {old['ms']:.1f} | {new['ms']:.1f} | "
                f"{new['ms'] / old['ms']:.2f} | {flops} |"
            )


def measure(arguments: argparse.Namespace) -> None:
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    generator, discriminator, images = pair(arguments.networks)
    images = np.random.default_rng(0).normal(size=(BATCH, *images)).astype("float32")
    if keras.backend.backend() == "jax":
        step, flops = jax_step(arguments.way, generator, discriminator, images)
    else:
        step, flops = tensorflow_step(arguments, generator, discriminator, images), 0
    report(ms=cpu_ms(step, repeats=15, warmup=3), flops=flops)


def pair(name):
    """Generator, discriminator, and the shape of an image."""
    import keras
    from gan_networks import digit_networks

    if name == "dcgan":
        return *digit_networks("plain"), (28, 28, 1)

    def layers(count):
        return keras.Sequential(
            [
                keras.Input((WIDTH,)),
                *(keras.layers.Dense(WIDTH, "relu", use_bias=False) for _ in range(count - 1)),
                keras.layers.Dense(WIDTH, use_bias=False),  # a score for each output
            ]
        )

    return layers(4), layers(3), (WIDTH,)


def adam():
    import keras

    return keras.optimizers.Adam(2e-4, beta_1=0.5)


def tensorflow_step(arguments, generator, discriminator, images):
    from gan_alternating import AlternatingGAN

    from keras_ext.losses.gan import NonSaturating
    from keras_ext.training.gan import SingleLossGAN

    if arguments.way == "single":
        gan = SingleLossGAN(generator, discriminator, "non_saturating")
        gan.compile(optimizer=adam(), jit_compile=arguments.jit)
    else:
        gan = AlternatingGAN(generator, discriminator, NonSaturating())
        gan.compile(adam(), adam(), jit_compile=arguments.jit)
    return lambda: gan.train_on_batch(images)


def jax_step(way, generator, discriminator, images):
    """A compiled step on state that it carries along, and its FLOPs."""
    import jax

    from keras_ext.training.gan import SingleLossGAN

    if way == "single":
        gan = SingleLossGAN(generator, discriminator, "non_saturating")
        gan.compile(optimizer=adam())
        gan.optimizer.build(gan.trainable_variables)
        gan.train_on_batch(images)  # builds the metrics

        def function(state, images):
            return gan.train_step(state, (images,))[1]

        variables = (
            gan.trainable_variables,
            gan.non_trainable_variables,
            gan.optimizer.variables,
            gan.metrics_variables,
        )
    else:
        function, variables = alternating(generator, discriminator)
    state = jax.tree.map(lambda v: jax.numpy.array(v.value), variables)
    images = jax.numpy.asarray(images)
    compiled = jax.jit(function, donate_argnums=0).lower(state, images).compile()
    cost = compiled.cost_analysis()
    box = [state]

    def step():
        box[0] = jax.block_until_ready(compiled(box[0], images))

    return step, (cost[0] if isinstance(cost, list) else cost)["flops"]


def alternating(generator, discriminator):
    """An ordinary alternating step in JAX: (function of (state, images), the state)."""
    import jax
    import keras

    from keras_ext.losses.gan import NonSaturating

    loss, optimizers = NonSaturating(), (adam(), adam())
    seed = keras.random.SeedGenerator(0)
    for optimizer, network in zip(optimizers, (discriminator, generator), strict=True):
        optimizer.build(network.trainable_variables)

    def loss_d(d, d_state, images, made):
        real, d_state = discriminator.stateless_call(d, d_state, images, training=True)
        fake, d_state = discriminator.stateless_call(d, d_state, made, training=True)
        return loss.discriminator(real, fake), d_state

    def loss_g(g, g_state, d, d_state, noise):
        made, g_state = generator.stateless_call(g, g_state, noise, training=True)
        fake, d_state = discriminator.stateless_call(d, d_state, made, training=True)
        return loss.generator(None, fake), (g_state, d_state)

    def function(state, images):
        d, d_state, d_opt, g, g_state, g_opt, counter = state
        counter = counter + jax.numpy.array([0, 1], counter.dtype)
        keys = jax.random.split(jax.random.PRNGKey(counter[1]))
        noise = [
            jax.random.normal(key, (len(images), *generator.input_shape[1:])) for key in keys
        ]
        made, g_state = generator.stateless_call(g, g_state, noise[0], training=True)
        (_, d_state), grads = jax.value_and_grad(loss_d, has_aux=True)(d, d_state, images, made)
        d, d_opt = optimizers[0].stateless_apply(d_opt, grads, d)
        (_, (g_state, d_state)), grads = jax.value_and_grad(loss_g, has_aux=True)(
            g, g_state, d, d_state, noise[1]
        )
        g, g_opt = optimizers[1].stateless_apply(g_opt, grads, g)
        return d, d_state, d_opt, g, g_state, g_opt, counter

    halves = [
        (network.trainable_variables, network.non_trainable_variables, optimizer.variables)
        for network, optimizer in zip((discriminator, generator), optimizers, strict=True)
    ]
    return function, (*halves[0], *halves[1], seed.state)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", choices=("layers", "dcgan"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--jit", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

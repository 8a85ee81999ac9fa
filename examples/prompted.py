"""A prompted pipeline: learn on some prompts, apply on others. Few steps and one pass, to be quick: take more."""

import stepmask
from stepmask import zoo
from stepmask.denoiser.conditioning import Conditioning
from stepmask.learning.trained import TrainedForecasts

STEPS = 6

pipe = zoo.load("zoo:pixart-emoji")
pipe.set_progress_bar_config(disable=True)
learned_on = ["a noto drawing of spaghetti", "a noto drawing of deciduous tree"]
drawn = ["a noto drawing of sunrise over mountains", "a noto drawing of hash key"]

# `call` adds what PixArt's pipelines must be told besides; seeds are of the noise
told = Conditioning.prompted(pipe, learned_on)
trajectories = [stepmask.record(pipe, seed=seed, **told.call(1, seed), num_inference_steps=STEPS) for seed in range(2)]
schedule = stepmask.learn(pipe, trajectories, budget=0.6, learner=TrainedForecasts(passes=1))  # the default is 15

asked = Conditioning.prompted(pipe, drawn).call(len(drawn), seed=None)
with stepmask.apply(pipe, schedule):
    images = pipe(**asked, num_inference_steps=STEPS).images

print(f"{len(images)} images under {schedule}")
print(stepmask.evaluate(pipe, schedule, repeats=1, **asked, num_inference_steps=STEPS))

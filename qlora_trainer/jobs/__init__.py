"""What several commands share: the configuration becomes the rooms' own options, their results one answer.

`wiring` turns keys into options, `planning` makes the plan, `training` has the parts of a training run and
`accept` decides what a run goes on from, `fit` holds data against the model's limits, `comparison` measures
base beside tuned, `verification` exports beside the trained model, `page` makes the run's page.
"""

"""The evaluate room: how good is the model that was trained, beside the base it came from.

`perplexity` measures loss on labelled tokens, `match` compares answers with their references,
 `report` shows base and tuned side by side. In: a model or its `forward`, batches and
prompts. Out: numbers and the examples behind them. The base is the tuned model with all
that was trained switched off (`model.residual.base_alone`), so both see the same weights.
"""

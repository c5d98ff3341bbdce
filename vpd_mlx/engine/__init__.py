"""The network, in the order of one update. It knows token ids, weights and losses; no task, no feedback, no algorithm.

`settings` holds the recipe's sections about it. `models` loads a model and probes what it allows, and reads and writes LoRA
folders; `lora` is the adapter's layers, mlx-lm's computed with less; `policy` is the one copy of the weights that is student,
teacher and initial model in turn.
`sampling` decodes a step's completions. To learn from them, `batching` packs rows into padded arrays of a bounded size and lets
completions share one pass over their prompt; `heads` turns hidden states into token losses chunk by chunk, never
holding all logits; `learner` sums a minibatch's gradient over micro-batches and applies it with AdamW.
`ranks` divides all of this among processes, and notices when one of them is lost.
"""

__all__: list[str] = []

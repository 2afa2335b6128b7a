"""Which sizes MQAR can have, wherever it is drawn, and the rules that its relatives share with it.

Below every task, so that each way of drawing one refuses the same sizes with the same words.
"""

from __future__ import annotations

from dspace.tasks.base import Rule, require, require_integers


def check_mqar(
    vocab_size: int, input_seq_len: int, num_kv_pairs: int, power_a: float = 0.01, random_non_queries: bool = True
) -> None:
    """Raise a UserError that names each rule that these sizes break."""
    require_integers("mqar", vocab_size=vocab_size, input_seq_len=input_seq_len, num_kv_pairs=num_kv_pairs)
    require(
        [*common_rules(vocab_size, input_seq_len, num_kv_pairs, power_a), fits(input_seq_len, num_kv_pairs)], "mqar"
    )


def some_pairs(num_kv_pairs: int) -> Rule:
    """The rule that there is something to recall."""
    return num_kv_pairs >= 1, f"num_kv_pairs = {num_kv_pairs} must be at least 1", "ask for one pair or more"


def positive_power(power_a: float) -> Rule:
    """The rule that the gaps have a power law."""
    return power_a > 0, f"power_a = {power_a} must be positive", "the published value is 0.01"


def fits(input_seq_len: int, num_kv_pairs: int) -> Rule:
    """The rule that the pairs and as many query slots fit into the sequence."""
    return (
        4 * num_kv_pairs <= input_seq_len,
        f"4 * num_kv_pairs = {4 * num_kv_pairs} must be at most input_seq_len = {input_seq_len}: "
        "a pair takes two tokens, its query two more",
        f"num_kv_pairs <= {input_seq_len // 4} or input_seq_len >= {4 * num_kv_pairs}",
    )


def common_rules(vocab_size: int, input_seq_len: int, num_kv_pairs: int, power_a: float) -> list[Rule]:
    """Rules shared by the tasks whose context is all pairs."""
    keys = vocab_size // 2 - 1
    return [
        some_pairs(num_kv_pairs),
        (input_seq_len % 2 == 0, f"input_seq_len = {input_seq_len} must be even", f"use {input_seq_len + 1}"),
        (
            vocab_size > input_seq_len,
            f"vocab_size = {vocab_size} must exceed input_seq_len = {input_seq_len}",
            f"vocab_size >= {input_seq_len + 1}",
        ),
        (
            keys >= num_kv_pairs,
            f"vocab_size = {vocab_size} has {keys} keys (1 .. vocab_size/2 - 1) for {num_kv_pairs} distinct ones",
            f"vocab_size >= {2 * num_kv_pairs + 2}",
        ),
        positive_power(power_a),
    ]

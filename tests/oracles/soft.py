"""The four variants of HAM's soft attention: one head, one sample."""

import math

from oracles.rows import Matrix, Sees, Vector, apply, dot, everybody, mix, transposed, weigh


def pooled_map(v: Matrix, weight: Matrix, bias: Vector, score: Vector, keep: list[bool]) -> list[float]:
    """u_n = tanh(v_n W + b), e_n = w · u_n, α = softmax over tokens; W is (d a)."""
    columns = transposed(weight)
    scores = []
    for value in v:
        u = [math.tanh(z) for z in apply(columns, value, bias)]
        scores.append(dot(score, u))
    return weigh(scores, keep)


def pooled(
    v: Matrix, weight: Matrix, bias: Vector, score: Vector, keep: list[bool], queries: int
) -> list[list[float]]:
    """c = Σ α_n v_n, the same for every query."""
    alpha = pooled_map(v, weight, bias, score, keep)
    return [mix(alpha, v, len(v[0])) for _ in range(queries)]


def gated(
    v: Matrix, weight: Matrix, bias: Vector, score: Vector, keep: list[bool], scale: float
) -> list[list[float]]:
    """s_n = scale · α_n v_n."""
    alpha = pooled_map(v, weight, bias, score, keep)
    return [[scale * a * x for x in value] for a, value in zip(alpha, v, strict=True)]


def pair_score(query: Vector, key: Vector, query_weight: Matrix, key_weight: Matrix, score: Vector) -> float:
    """w · tanh(W₁ k + W₂ q), both matrices (d a)."""
    from_key, from_query = apply(transposed(key_weight), key), apply(transposed(query_weight), query)
    return dot(score, [math.tanh(x + y) for x, y in zip(from_key, from_query, strict=True)])


def bahdanau(
    q: Matrix,
    k: Matrix,
    v: Matrix,
    query_weight: Matrix,
    key_weight: Matrix,
    score: Vector,
    sees: Sees = everybody,
) -> list[list[float]]:
    """One additive query per token: s_i = Σ_j α_ij v_j."""
    out = []
    for i, query in enumerate(q):
        scores = [pair_score(query, key, query_weight, key_weight, score) for key in k]
        out.append(mix(weigh(scores, [sees(i, j) for j in range(len(k))]), v, len(v[0])))
    return out


def cls_query(
    q: Matrix, k: Matrix, v: Matrix, query_weight: Matrix, key_weight: Matrix, score: Vector
) -> list[list[float]]:
    """The first token asks for all."""
    first = bahdanau(q[:1], k, v, query_weight, key_weight, score)[0]
    return [first for _ in q]

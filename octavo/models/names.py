"""Canonical tensor names: what the decoder asks for and every weight source answers to. One list, no synonyms.

    embed                     [vocab, embedding_size]     position_embed          [learned_positions, hidden]
    project_in, project_out   (OPT-350m)                  final_norm.{weight,bias}
    lm_head                   [vocab, embedding_size]     absent when tied: the decoder asks for `embed`

    layers.N.attn_norm.{weight,bias}        layers.N.mlp_norm.{weight,bias}
    layers.N.attn_post_norm.weight          layers.N.mlp_post_norm.weight
    layers.N.{q,k,v,o}.{weight,bias}        layers.N.{q_norm,k_norm}.weight
    layers.N.{gate,up,down}.{weight,bias}   (`up` and `down` alone where the MLP is not gated)

    layers.N.router.weight                  layers.N.experts.E.{gate,up,down}.weight
    layers.N.shared_gate.weight [1, hidden] layers.N.shared.{gate,up,down}.weight

Matrices are [out, in]. A checkpoint that stores q, k and v (or gate and up) as one tensor is split by its source.
"""

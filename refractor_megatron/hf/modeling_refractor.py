"""REFRACTOR decoder in plain torch and transformers: tri-tier or linear attention under compiled rules, with experts.

Self-contained: with the other files of its kind it travels beside the weights. Tokens carry *records* (document,
segment, role, mask bits), and rules on records say who may read whom. A cache of bounded size serves decoding: the keys
of the local window, and the summaries of complete blocks.

Shapes: b samples, n new tokens, h query heads, g key/value heads, d head width, m keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_refractor import RefractorConfig
from .masking_refractor import (
    RETRIEVED_ROLE,
    RefractorCache,
    Rules,
    Step,
    check_inputs,
    derived_records,
    refuse_unknown,
    write,
)
from .pooling_refractor import Rotary, favor_directions, pool, rotated, take

#: Score elements of one piece of a long prompt: bounds the memory of the prefill.
_PIECE_ELEMENTS = 1 << 25


# ------------------------------------------------------------------------------------------------------------ attention

Part = tuple[Tensor, Tensor]  # keys, values [b, g, m, d]


def attend(q: Tensor, parts: list[Part], hidden: Tensor, scale: float) -> Tensor:
    """One softmax of q [b, h, n, d] over the keys of all parts -> [b, h, n, d]; rows without a key are zero.

    hidden: bool [b, 1, 1, n, m], over the keys of all parts.
    """
    b, h, n, d = q.shape
    g = parts[0][0].shape[1]
    folded = q.reshape(b, g, h // g * n, d) * scale  # heads that share a key head become rows
    scores = torch.cat([folded @ k.transpose(-1, -2) for k, _ in parts], dim=-1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scores.to(wide).view(b, g, h // g, *hidden.shape[-2:]).masked_fill(hidden, torch.finfo(wide).min)
    weight = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0).to(q.dtype).flatten(2, 3)
    shares = torch.split(weight, [k.shape[2] for k, _ in parts], dim=-1)
    out = sum(share @ v for share, (_, v) in zip(shares, parts, strict=True))
    return torch.as_tensor(out).view(b, h, n, d)


class RefractorAttention(nn.Module):
    """Attention of one layer: the tiers under one softmax or one each, or linear attention in their place."""

    def __init__(self, config: RefractorConfig, layer: int, rotary: Rotary) -> None:
        super().__init__()
        self.config, self.layer, self.rotary = config, layer, rotary
        self.tiers = config.layer_tiers(layer)
        h, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.scale = h, g, d**-0.5
        self.q_proj = nn.Linear(config.hidden_size, h * d, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, g * d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, g * d, bias=False)
        self.o_proj = nn.Linear(h * d, config.hidden_size, bias=False)
        spec = config.summaries
        if spec and spec["pooling"] == "attn_pool":
            self.summary_query = nn.Parameter(torch.empty(g, spec["per_block"], d))
            if spec["levels"] == 2:
                self.group_query = nn.Parameter(torch.empty(g, spec["per_block"], d))
        if "retrieved" in self.tiers and config.retrieval:
            self.retrieved_key = nn.Linear(config.retrieval["dim"], g * d, bias=False)
            self.retrieved_value = nn.Linear(config.retrieval["dim"], g * d, bias=False)
        if config.combine == "gated":
            self.tier_gate_bias = nn.Parameter(torch.empty(h, len(self.tiers)))
            self.tier_gate_weight = nn.Parameter(torch.empty(h, len(self.tiers), len(config.roles) + 3))
        self._directions: Tensor | None = None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[b, n, hidden] -> the same."""
        b, n, _ = x.shape
        q, k, v = (
            p(x).view(b, n, -1, self.config.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotated(t, *step.rotation) for t in (q, k))
        held = step.cache.layers[self.layer] if step.cache is not None else {}
        out = self._linear(q, k, v, step, held) if step.linear else self._tri_tier(q, k, v, step, held)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))

    def _tri_tier(self, q: Tensor, k: Tensor, v: Tensor, step: Step, held: dict[str, Tensor]) -> Tensor:
        known = step.ring.position.shape[1]
        ring = [held[name][:, :, :known] if known else k[:, :, :0] for name in ("k", "v")]
        parts: dict[str, list[Part]] = {"local": [(ring[0], ring[1]), (k, v)]}
        if self.config.summaries:
            parts["summary"] = self._summaries(ring, k, v, step, held)
        if "retrieved" in self.tiers:
            parts["retrieved"] = [self._retrieved(k, step, held)]
        out = self._combined(q, parts, step)
        if step.cache is not None:  # only now: the ring's oldest keys make room for the new ones
            self._remember(k, v, step, held)
        return out

    def _combined(self, q: Tensor, parts: dict[str, list[Part]], step: Step) -> Tensor:
        """One softmax over the keys of all tiers, or the gated or plain sum of one for each."""
        if self.config.combine == "joint":
            return attend(q, [part for tier in self.tiers for part in parts[tier]], step.hidden(self.tiers), self.scale)
        alone = [attend(q, parts[tier], step.hidden((tier,)), self.scale) for tier in self.tiers]
        outs = torch.stack(alone)  # [tiers, b, h, n, d]
        if self.config.combine == "gated":
            features = step.gate_features.to(self.tier_gate_weight)
            logits = torch.einsum("htk,bnk->tbhn", self.tier_gate_weight, features)
            outs = outs * torch.sigmoid(logits + self.tier_gate_bias.T[:, None, :, None])[..., None].to(outs.dtype)
        return outs.sum(0)

    def _remember(self, k: Tensor, v: Tensor, step: Step, held: dict[str, Tensor]) -> None:
        """Puts the new keys and values into the ring."""
        cache = step.cache
        assert cache is not None
        after = step.length + step.count
        most = None if cache.grows else cache.ring
        size = int(after.max()) if most is None else min(int(after.max()), most)
        for name, new in (("k", k), ("v", v)):
            buffer = cache.buffer(held, name, new, size, 2, most)
            recent = step.valid & (step.new.position >= after[:, None] - buffer.shape[2])
            write(buffer, step.new.position % buffer.shape[2], recent, new.detach(), 2)

    def _summaries(self, ring: list[Tensor], k: Tensor, v: Tensor, step: Step, held: dict[str, Tensor]) -> list[Part]:
        """Both levels, level 2 first; those that the new tokens complete are made now."""
        spec = self.config.summaries
        assert spec is not None
        block, per_block, fanout = spec["block_size"], spec["per_block"], spec["fanout"]
        made = k[:, :, :0], v[:, :, :0]
        if step.block.shape[1]:
            keys, values = (take(torch.cat(pair, 2), step.block_tokens) for pair in zip(ring, (k, v), strict=True))
            made = self._pooled(keys, values, step.block, block, 1, 1.0, getattr(self, "summary_query", None))
        lower = self._kept("summary", made, step.block, step.block_ok, step.masks["summary"][-1].shape[2], step, held)
        parts = [lower]
        if spec["levels"] == 2:
            made = k[:, :, :0], v[:, :, :0]
            if step.group.shape[1]:
                size = fanout * per_block
                item = (step.group[..., None] * size + torch.arange(size, device=k.device)).flatten(1)
                keys, values = (take(x, item.clamp(max=x.shape[2] - 1)) for x in lower)
                together = per_block if spec["pooling"] == "attn_pool" else 1
                queries = getattr(self, "group_query", None)
                made = self._pooled(keys, values, step.group, size, together, block * together / per_block, queries)
            upper = self._kept("group", made, step.group, step.group_ok, step.masks["summary"][0].shape[2], step, held)
            parts.insert(0, upper)
        return parts

    def _pooled(
        self, k: Tensor, v: Tensor, index: Tensor, size: int, together: int, spacing: float, queries: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Summaries of groups ``index`` [b, x] of ``size`` items each, of which ``together`` share a position and the
        next stand ``spacing`` tokens on. Without pooling queries a group is cut into its S equal parts."""
        spec = self.config.summaries
        assert spec is not None
        parts = 1 if spec["pooling"] == "attn_pool" else spec["per_block"]
        items, groups = size // parts, index.shape[1] * parts
        span = items / together * spacing
        number = (index[..., None] * parts + torch.arange(parts, device=k.device)).flatten(1)  # [b, x parts]
        centre = number.double() * span + (span - 1) / 2
        offset = (torch.arange(items, device=k.device) // together + 0.5).double() * spacing - span / 2
        k, v = (t.reshape(*t.shape[:2], groups, items, t.shape[3]) for t in (k, v))
        return pool(spec["pooling"], k, v, offset, centre, queries, self.rotary)

    def _kept(
        self,
        name: str,
        made: tuple[Tensor, Tensor],
        index: Tensor,
        ok: Tensor,
        total: int,
        step: Step,
        held: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The ``total`` summaries of a level: those in the cache and those just made, S for each place of ``index``."""
        if step.cache is None:
            return made
        spec = self.config.summaries
        assert spec is not None
        s = spec["per_block"]
        place = (index[..., None] * s + torch.arange(s, device=index.device)).flatten(1)
        keys, values = (
            step.cache.buffer(held, f"{name}_{x}", like, total, 2) for x, like in zip("kv", made, strict=True)
        )
        if index.shape[1]:
            for buffer, new in zip((keys, values), made, strict=True):
                write(buffer, place, ok.repeat_interleave(s, 1), new.detach(), 2)
        return keys[:, :, :total], values[:, :, :total]

    def _retrieved(self, like: Tensor, step: Step, held: dict[str, Tensor]) -> Part:
        """Keys and values of the records that the current chunk and the chunks beginning here may read."""
        spec = self.config.retrieval
        assert spec is not None
        vectors = step.record_vectors.flatten(1, 2).to(like)  # [b, x R, D]
        shape = (*vectors.shape[:2], self.kv_heads, self.config.head_dim)
        k, v = (p(vectors).view(shape).transpose(1, 2) for p in (self.retrieved_key, self.retrieved_value))
        k = self.rotary.turn(k, step.record_place[:, None], self.rotary.factor)
        if step.cache is not None:
            fan_in = spec["fan_in"]
            both = []
            for name, new in (("record_k", k), ("record_v", v)):
                old = held.get(name, new.new_zeros(*new.shape[:2], fan_in, new.shape[3]))
                both.append(torch.cat([old, new], 2))
                index = step.current[:, None] * fan_in + torch.arange(fan_in, device=new.device)
                held[name] = take(both[-1], index).detach()
            k, v = both
        return k, v

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, step: Step, held: dict[str, Tensor]) -> Tensor:
        """Weights phi(q) . phi(k): keys of this call one by one, earlier ones as sums of phi(k) v for each state."""
        b, h, n, d = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        fq = self._features(q.to(wide).reshape(b, self.kv_heads, -1, d), query=True)
        fk, v1 = self._features(k.to(wide), query=False), F.pad(v.to(wide), (0, 1), value=1.0)
        group = h // self.kv_heads
        weight = (fq @ fk.transpose(-1, -2)) * step.within.to(wide).repeat(1, group, 1)[:, None]
        sums = weight @ v1  # [b, g, group n, d + 1]
        state = held.get("state")  # [b, g, lanes, m, d + 1]
        if state is not None and state.shape[2]:
            reads = step.reads.to(wide).repeat(1, group, 1)
            sums = sums + torch.einsum("bgnm,bgsmx,bns->bgnx", fq, state, reads)
        if step.cache is not None:
            fresh = torch.einsum("bgnm,bgnx,bns->bgsmx", fk, v1, step.made.to(wide))
            old = torch.einsum("bgsmx,bst->bgtmx", state, step.kept.to(wide)) if state is not None else 0
            held["state"] = (fresh + old).detach()
        total = sums[..., -1:]
        dead = total <= torch.finfo(wide).tiny * 1e8
        out = torch.where(dead, 0, sums[..., :-1]) / torch.where(dead, 1, total)
        return out.reshape(b, h, n, d).to(q.dtype)

    def _features(self, x: Tensor, query: bool) -> Tensor:
        """[b, g, ..., d] -> [b, g, ..., m], positive."""
        spec = self.config.linear_attention
        assert spec is not None
        if spec["kernel"] == "elu+1":
            return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
        if self._directions is None:
            shape = (self.kv_heads, spec["features"], self.config.head_dim)
            self._directions = favor_directions(spec["seed"], self.layer + 1, *shape)
        w = self._directions.to(x)
        projected = torch.einsum("bgnd,gmd->bgnm", x * self.scale**0.5, w)
        if query:  # a factor of the query alone cancels
            return (projected - projected.detach().amax(-1, keepdim=True)).exp()
        highest = 0.5 * w.square().sum(-1).amax(-1) - 60.0  # one factor for all keys of a head cancels too
        return (projected - 0.5 * self.scale * x.square().sum(-1, keepdim=True) - highest[:, None, None]).exp()


# --------------------------------------------------------------------------------------------------------- feed-forward


class RefractorMLP(nn.Module):
    """SwiGLU (gate, up, down) or GELU (up, down)."""

    def __init__(self, config: RefractorConfig) -> None:
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        if config.hidden_act == "silu":
            self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)
        self.gated = config.hidden_act == "silu"

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up if self.gated else F.gelu(up))


class RefractorGate(nn.Module):
    """Expert router: weight [E, hidden], and [E, roles + 3] for the token's role and scope bits."""

    def __init__(self, config: RefractorConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router_gate_features:
            self.feature_weight = nn.Parameter(torch.empty(config.num_experts, len(config.roles) + 3))

    def forward(self, x: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [t, hidden], features [t, K] -> weights and numbers [t, k] of the chosen experts."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = x.to(wide) @ self.weight.to(wide).T
        if self.config.router_gate_features:
            assert features is not None
            logits = logits + features.to(wide) @ self.feature_weight.to(wide).T
        logits = logits / self.config.router_temperature
        k = self.config.num_experts_per_tok
        if self.config.norm_topk_prob:
            top, chosen = logits.topk(k, dim=-1)
            return top.softmax(-1), chosen
        top, chosen = logits.softmax(-1).topk(k, dim=-1)
        return top, chosen


class RefractorMoE(nn.Module):
    """Mixture of experts without capacity: no token evicts another."""

    def __init__(self, config: RefractorConfig) -> None:
        super().__init__()
        self.gate = RefractorGate(config)
        self.experts = nn.ModuleList(RefractorMLP(config) for _ in range(config.num_experts))
        self.uses_features = config.router_gate_features

    def forward(self, x: Tensor, step: Step) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        features = step.gate_features.reshape(len(flat), -1) if self.uses_features else None
        weight, chosen = self.gate(flat, features)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            token, slot = (chosen == number).nonzero(as_tuple=True)
            share = self.experts[number](flat[token]) * weight[token, slot, None].to(flat.dtype)
            out.index_add_(0, token, share)
        return out.view_as(x)


class RefractorDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, residual; norm, feed-forward, residual."""

    def __init__(self, config: RefractorConfig, layer: int, rotary: Rotary) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = RefractorAttention(config, layer, rotary)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RefractorMoE(config) if config.num_experts else RefractorMLP(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step)
        y = self.post_attention_layernorm(x)
        return x + (self.mlp(y, step) if isinstance(self.mlp, RefractorMoE) else self.mlp(y))


# ---------------------------------------------------------------------------------------------------------------- model


class RefractorPreTrainedModel(PreTrainedModel):
    """Weights, initialisation, and what transformers asks of a model."""

    config_class = RefractorConfig
    base_model_prefix = "model"
    _skip_keys_device_placement = "past_key_values"
    _is_stateful = True  # the ring cannot take back the tokens that a draft model proposed
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """Normal of ``initializer_range``; norms one; role table, tier gates and feature weights zero."""
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(weight)
            elif name in ("tier_gate_bias", "tier_gate_weight", "feature_weight") or hasattr(module, "starts_at_zero"):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=self.config.initializer_range)


class RefractorModel(RefractorPreTrainedModel):
    """The decoder without its output head."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]

    def __init__(self, config: RefractorConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.role_embeddings:
            # plain text is what other roles differ from: its row stays as it is
            plain = config.roles.index(RETRIEVED_ROLE)
            self.role_embeddings = nn.Embedding(len(config.roles), config.hidden_size, padding_idx=plain)
            self.role_embeddings.starts_at_zero = True  # type: ignore[assignment]
        self.rotary = Rotary(config)
        layers = (RefractorDecoderLayer(config, n, self.rotary) for n in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rules = Rules(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        records: Tensor | None = None,
        retrieved: tuple[Tensor, Tensor] | None = None,
        past_key_values: RefractorCache | None = None,
        use_cache: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, n, hidden] of new tokens, those of the last layer alone.

        Args:
            input_ids: int [b, n]. attention_mask: [b, >= n], 0 for padding anywhere; its last n columns count.
            records: int [b, n, 4] = (document, segment, role, mask bits); None: see ``derived_records``.
            retrieved: vectors [b, U, R, D] and policies int [b, U, R] (-1: no record) that the chunks beginning within
                these tokens may read: those found with the chunk before. None: nothing was retrieved.
            past_key_values: what came before; use_cache: give it back, extended.
        """
        refuse_unknown(unknown, self.config)
        check_inputs(self.config, input_ids, records, retrieved)
        b, n = input_ids.shape
        device = input_ids.device
        self.rules.to(device)
        use_cache = (self.config.use_cache and not torch.is_grad_enabled()) if use_cache is None else use_cache
        cache = past_key_values
        if torch.is_grad_enabled() and (use_cache or cache is not None):
            raise ValueError("a cache keeps no graph: call the model inside torch.no_grad(), or with use_cache=False")
        if cache is None and (use_cache or (not torch.is_grad_enabled() and n > self._piece(0, n))):
            cache = RefractorCache(self.config)
        if cache is not None and not len(cache.length):
            cache.length = torch.zeros(b, dtype=torch.long, device=device)
        valid = torch.ones(b, n, dtype=torch.bool, device=device)
        order = None
        if attention_mask is not None and not bool((valid := attention_mask[:, -n:].bool()).all()):
            if not valid.any():
                raise ValueError("attention_mask hides every token of this call")
            order = valid.int().argsort(dim=1, descending=True, stable=True)  # real tokens first
            input_ids, valid = input_ids.gather(1, order), valid.gather(1, order)
            if records is not None:
                records = records.gather(1, order[..., None].expand(-1, -1, 4))
        if records is None:
            records = derived_records(self.config, input_ids, valid, cache)
        hidden = self._in_pieces(input_ids, records, valid, retrieved, cache)
        hidden = self.norm(hidden)
        if cache is not None:
            cache.columns += n
        if order is not None:
            hidden = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache if use_cache else None)

    def _piece(self, known: int, n: int) -> int:
        """Tokens that pass together, so that scores stay within bounds."""
        reach, spec = self.config.reach, self.config.summaries
        keys = min(known + n, (reach if reach is not None else known + n) + 2048)
        keys += (known + n) // spec["block_size"] * spec["per_block"] if spec else 0
        return max(64, min(1024, _PIECE_ELEMENTS // (self.config.num_attention_heads * max(1, keys))) // 64 * 64)

    def _in_pieces(
        self, ids: Tensor, records: Tensor, valid: Tensor, retrieved: Any, cache: RefractorCache | None
    ) -> Tensor:
        """Hidden states before the last norm; with a cache, long inputs pass piece by piece."""
        first_chunk = None
        if self.config.retrieval:
            length = cache.length if cache is not None else torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            first_chunk = -(-length // self.config.retrieval["chunk"])
        n, out, start = ids.shape[1], [], 0
        while start < n:
            stop = n if cache is None else min(n, start + self._piece(cache.longest, n - start))
            part = slice(start, stop)
            x = self.embed_tokens(ids[:, part])
            if self.config.role_embeddings:
                x = x + self.role_embeddings(records[:, part, 2].long())
            step = Step(self.config, self.rules, cache, records[:, part], valid[:, part], retrieved, first_chunk)
            step.rotation = self.rotary.angles(step.new.position.clamp(min=0)[:, None], x.dtype, self.rotary.factor)
            for layer in self.layers:
                x = layer(x, step)
            if cache is not None:
                self._commit(cache, ids[:, part], step)
            out.append(x)
            start = stop
        return torch.cat(out, 1) if len(out) > 1 else out[0]

    def _commit(self, cache: RefractorCache, ids: Tensor, step: Step) -> None:
        """The tokens of a step are past now."""
        held = cache.buffer(cache.shared, "ids", ids, int((cache.length + ids.shape[1]).max()), 1)
        write(held, step.new.position, step.valid, ids)
        cache.length = cache.length + step.count


class RefractorForCausalLM(RefractorPreTrainedModel, GenerationMixin):
    """The decoder with its output head: training loss, logits and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RefractorConfig) -> None:
        super().__init__(config)
        self.model = RefractorModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        records: Tensor | None = None,
        retrieved: tuple[Tensor, Tensor] | None = None,
        past_key_values: RefractorCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, n, vocab] of all, or the last ``logits_to_keep``, tokens; arguments as in ``RefractorModel``.

        With ``labels`` [b, n] (those of the tokens themselves, -100 for none) also the loss of the next token.
        """
        loss_options = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        out = self.model(input_ids, attention_mask, records, retrieved, past_key_values, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(out.last_hidden_state[:, kept if isinstance(logits_to_keep, int) else logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """transformers' hook: our cache in place of its own."""
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation {generation_config.cache_implementation!r} is none of this model's")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = RefractorCache(self.config)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """transformers' hook: given records and retrieved ones are the prompt's; later tokens go on from its last."""
        records, retrieved = kwargs.pop("records", None), kwargs.pop("retrieved", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if records is None and retrieved is None:
            return inputs
        if inputs.get("past_key_values") is None:
            raise ValueError("records and retrieved go with a cache: leave out use_cache=False")
        end, n = input_ids.shape[1], inputs["input_ids"].shape[1]
        if records is not None and end <= records.shape[1]:
            inputs["records"] = records[:, end - n : end]
        if retrieved is not None and kwargs.get("is_first_iteration", False):
            copies = len(input_ids) // len(retrieved[0])  # beams and several answers to one prompt
            inputs["retrieved"] = tuple(x.repeat_interleave(copies, 0) for x in retrieved)
        return inputs


__all__ = ["RefractorCache", "RefractorForCausalLM", "RefractorModel", "RefractorPreTrainedModel"]

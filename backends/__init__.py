"""The backend contract: what an accelerator must provide to serve language models, to be read in an hour.

A plugin has two halves. The parent half, `Plugin`, answers questions in the API and engine processes; it imports no
SDK, no torch, and touches no device. The worker half, `Backend`, is made by `Plugin.create` in a worker and owns the
device. pluggy finds plugins at start-up; in the step loop there are plain method calls only.

    parent half    plugin  capabilities  options  shapes  formats  errors  hookspecs  registry  probing  matrix
    each step      step
    worker half    backend  runtime  kv_cache  attention  quantization  ops  collectives  compiler  sampler  telemetry

Rules that hold everywhere:

- *Padding has meaning, not position.* Block 0 is null: never owned by a request; a plugin may write padding there, and
  what lies in it may be nan. Padding rows have query and context length 0 and the request slot `num_slots`, a sink.
  There is at least one row of logits, so that a step that draws nothing has the shape of others.
- *Host and device.* Host arrays are numpy int32 or float32, C-contiguous. Index tensors on the device are int32; int64
  only as the direct result of argmax or topk, narrowed at once; sums of int32 say dtype=int32; no negative index
  reaches an op. Outside contract members the core performs no operation on device tensors.
- *Waiting.* A step waits for the device at most once, in `Pending.result()` of its fetch, and the core fetches only
  steps that draw or score. fetch() is called right after its step and before the next; a step may overwrite the outputs
  of the one before. Steps without rows of logits are not waited for, so that any number of them may be under way: a
  plugin that reuses staging buffers keeps a ring of them and an event for each, and prepare() may wait for the copy
  that read the one it takes, never for the step. Load, warm-up, export_blocks and reset_slot lie outside steps.
- *Threads.* One thread drives a backend (`Pending.result()` may be called from another), with gradients off from
  warm-up on. A plugin changes no global state of torch after create().
- *Model code* between contract calls uses reshape, split, index_select, arithmetic and tanh, nothing else of torch.
- *Rows.* Decode rows come first. DECODE is a row that brings one token drawn by this engine since the row took its
  slot, and any drafts after it; everything else, a last chunk of one token or a recomputed row too, is PREFILL.
- *Slots.* Every request that runs holds one slot from admission to its end or preemption: its identity on the device,
  where its last drawn id and its token counts live.
- *Blocks.* Blocks are recycled unclean. No block written in a step is read by another row of that step.
- *Sharding.* ModelSpec and every spec are as one rank holds them. The core cuts the model into as many parts as
  worker_plan() says; an SPMD plugin returns one worker with several devices, nothing is cut, and LinearSpec.shard says
  how it may be. All ranks have parts of one size: what does not divide is padded with weights of 0 (heads, columns of
  an MLP, rows of the vocabulary), and KV heads are repeated where there are more ranks than heads. Every rank gets the
  same StepBatch and draws the same ids; the first one's are taken.
- *Versions.* `plugin.API_VERSION`. Before 1.0 only an equal minor is loaded and every change of a member raises it;
  from 1.0 on a minor only adds members with defaults.
"""

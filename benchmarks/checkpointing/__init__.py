"""What checkpoints cost a training, how fast they are durable and restored, beside peers and limits."""

"""How fast whole models run on the machine at hand: prefill and decode, beside BF16."""

"""What a decoder remembers: KV Cache++ (codecs of keys and values, the store of old chunks)."""

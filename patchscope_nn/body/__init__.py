"""Everything that runs inside an nnsight context, and travels to a server.

Only torch, nnsight and transformers are imported here, because a server has nothing else.

    program.py    one step of a plan as plain values, the input of everything here
    contexts.py   opens the nnsight contexts
    batch.py      runs prompts as padded rows
    packed.py     runs prompts as segments of one sequence
    states.py     reads and writes hidden states
    random.py     random numbers of many seeds at once
    attention.py  attention to a shared prefix
    mappings.py   applies a mapping
    readouts.py   the bodies of the readouts: what each kind reads from a patched run
    decoding.py   reads tokens after a prompt
"""

"""Quality on real models: whether the paper's effects show, and what the controls say. See README.md.

models.py       models given as NAME=FOLDER, under the names they have on the Hub
contexts.py     held-out contexts that end at a random token
next_token.py   token identity against the logit lens, by layer (section 4.1)
entities.py     entity description, by layer and entity (section 4.3)
cross_model.py  a small model's states read by a larger one, through fitted maps (section 4.4)
intervals.py    bootstrap intervals over data rows
write.py        tables, figures, and beside each the command that made it
"""

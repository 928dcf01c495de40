"""The inference room: a trained adapter or an export, loaded as it was trained, and a chat with it.

`load` turns a folder into a model and its tokenizer, `stop` knows which tokens end an answer, `generate`
writes answers, `chat` holds a conversation. In: folders and text. Out: models and text.
"""

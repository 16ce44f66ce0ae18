"""A rollout of written completions in place of sampled ones, so that reflections are known."""

import re

from open_r1.engines.backends import Backend, Completions

QUESTION = re.compile(r"What colour is picture (\d+)\? Choose between the following options: (\w+) or (\w+)")


def written(prompt: str) -> list[str]:
    """Four completions of a question of `support.write_examples`, whose first option is the right one."""
    number, right, wrong = QUESTION.search(prompt).groups()
    plain = [f"It is {wrong}.</think><answer>{right}</answer>", "no answer"]
    if int(number) % 2:  # so that processes see different shares
        return [f"It is {right}.</think><answer>{right}</answer>", f"<answer>{wrong}</answer>", *plain]
    return [
        f"It is {wrong}. Wait, look.</think><answer>{right}</answer>",  # corrects itself
        f"It is {right}. Hmm, no.</think><answer>{wrong}</answer>",  # and gets it wrong
        f"It is {right}. Let me double-check.</think><answer>{right}</answer>",  # reflects only
        *plain[:1],
    ]


class Written:
    """A backend that answers from paper; prompts are encoded by the one that it stands for."""

    def __init__(self, backend: Backend):
        self.encode, self.tokenizer = backend.encode, backend.processor.tokenizer

    def generate(self, prompts, repeats, settings):
        completions = []
        for prompt, count in zip(prompts, repeats, strict=True):
            texts = written(self.tokenizer.decode(prompt.input_ids))
            ids = [self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id] for text in texts]
            completions += ids[:count]
        return Completions(completions, None, prompts)

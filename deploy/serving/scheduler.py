"""Which texts the engine computes next: the queue between the fronts and the engine's streams.

Everything here runs in the event loop, one thing after the other, so nothing is locked. Only tokenizing and the engine
run in other threads.
"""

import asyncio
import concurrent.futures
import time

import numpy as np

# What a text costs, in seconds, for the order of the queue alone: 6 layers x 768 in INT8 on one core take about 1.5 ms
# per text and 0.15 ms per character.
SECONDS_PER_TEXT, SECONDS_PER_CHARACTER = 0.0015, 0.00015
# Requests up to this size are tokenized at once, in the event loop: about 2 ms at the most.
INLINE_CHARACTERS = 1000
# Texts that are tokenized in one go by the thread for larger requests, before another one gets its turn.
SLICE = 8
# Batches that wait in the streams' pool, so that a stream does not idle until the event loop gives it the next one.
AHEAD = 1
# Texts that are looked at for one batch: of so many, those of similar length are computed together.
WINDOW = 96


class Job:
    """One request on its way through the model. Args: now: time.monotonic(). scheduler: the one that has it."""

    def __init__(self, query, address, now, scheduler):
        self.query, self.address, self.scheduler = query, address, scheduler
        self.characters = sum(map(len, (*query.texts, *(query.pairs or ()))))
        self.seconds = SECONDS_PER_TEXT * len(query.texts) + SECONDS_PER_CHARACTER * self.characters
        # As if a request waited for nothing but itself: small ones overtake large ones, and none waits for ever.
        self.order = now + self.seconds
        self.features, self.truncated = [], []
        self.left = []  # numbers of the texts that no stream has taken
        self.begun = False  # whether a stream has taken a text of it
        self.logits, self.missing = None, len(query.texts)
        self.done = asyncio.get_running_loop().create_future()


class Scheduler:
    """Tokenizes requests, and hands their texts to the engine's streams, batch by batch.

    Args: op: worker.PPMiniLMOp. batch_size: the most texts in a batch. metrics: metrics.Metrics.
    """

    def __init__(self, op, batch_size, metrics):
        self.op, self.model, self.metrics, self.loop = op, op.model, metrics, asyncio.get_running_loop()
        self.rows = [rows for rows in self.model.rows if rows <= batch_size]
        self.untokenized, self.waiting, self.running = [], [], 0
        self.begun = {}  # {future of a batch: when it was handed to the streams}
        self.done_for = {}  # {address: seconds of engine that it got since it had nothing waiting}
        self.tokenizing = concurrent.futures.ThreadPoolExecutor(1)
        self.something_to_tokenize = asyncio.Event()
        self.tokenizer_task = self.loop.create_task(self.tokenize_large())

    async def run(self, job):
        """Waits for the logits of a job. If the caller gives up, what is not yet computed of it never is.

        Raises: ServiceError for a text without tokens, or if the engine fails.
        """
        # Who comes anew begins where the least served of the others are, not before them.
        self.done_for.setdefault(job.address, min(self.done_for.values(), default=0.0))
        try:
            if job.characters <= INLINE_CHARACTERS:
                self.tokenize(job, 0, len(job.query.texts))
                self.tokenized(job)
            else:
                self.untokenized.append(job)
                self.something_to_tokenize.set()
            return await job.done
        finally:
            for queue in (self.untokenized, self.waiting):
                if job in queue:
                    queue.remove(job)
            if not any(other.address == job.address for other in (*self.untokenized, *self.waiting)):
                self.done_for.pop(job.address, None)

    def tokenize(self, job, start, stop):
        """Tokenizes some texts of a job."""
        texts, pairs = job.query.texts[start:stop], job.query.pairs
        request = {"texts": texts, "pairs": pairs and pairs[start:stop], "number": start + 1}
        tokenized, _, _, _ = self.op.preprocess({"request": request})
        job.features += tokenized["features"]
        job.truncated += tokenized["truncated"]

    async def tokenize_large(self):
        """Tokenizes the large requests, a slice of the one that is next at a time."""
        while True:
            await self.something_to_tokenize.wait()
            if not self.untokenized:
                self.something_to_tokenize.clear()
                continue
            job = self.turns(self.untokenized)[0]
            start = len(job.features)
            try:
                await self.loop.run_in_executor(self.tokenizing, self.tokenize, job, start, start + SLICE)
            except Exception as error:
                if job in self.untokenized:  # its caller may have given up meanwhile
                    self.untokenized.remove(job)
                self.fail([job], error)
                continue
            if len(job.features) == len(job.query.texts) and job in self.untokenized:
                self.untokenized.remove(job)
                self.tokenized(job)

    def tokenized(self, job):
        job.left = list(range(len(job.features)))
        self.waiting.append(job)
        self.fill()

    def turns(self, jobs):
        """The jobs in the order of their turns: next is a job of the address for which least has been done so far."""
        of_address = {}
        for job in sorted(jobs, key=lambda job: job.order):
            of_address.setdefault(job.address, []).append(job)
        if len(of_address) == 1:
            return of_address[job.address]
        done, turns = {address: self.done_for.get(address, 0.0) for address in of_address}, []
        while of_address:
            address = min(of_address, key=done.get)
            job = of_address[address].pop(0)
            done[address] += job.seconds
            turns.append(job)
            if not of_address[address]:
                del of_address[address]
        return turns

    def fill(self):
        """Gives the streams batches as long as there are some that they can take."""
        self.waiting = [job for job in self.waiting if not job.done.done()]  # whose caller has not given up
        while self.running < self.model.streams + AHEAD and self.waiting:
            alone = not self.running and sum(len(job.left) for job in self.waiting) <= self.model.most_alone
            chosen, length = self.next_batch()
            engine = self.model.alone if alone else self.model.engine
            feed = {"features": [job.features[i] for job, i in chosen], "length": length, "engine": engine}
            places = self.model.streams + AHEAD if alone else 1  # alone it takes all threads
            self.running += places
            future = engine.pool.submit(self.op.process, [feed])
            self.begun[future] = time.monotonic()
            future.add_done_callback(
                lambda future, chosen=chosen, places=places: self.loop.call_soon_threadsafe(
                    self.computed, chosen, places, future
                )
            )

    def next_batch(self):
        """([(job, number of a text)], the length that they are padded to): one run of the engine.

        The texts whose turn it is are split into the runs that cost least together; the run that has the very first of
        them comes first.
        """
        texts = []
        for job in self.turns(self.waiting):
            texts += [(job, i) for i in job.left]
            if len(texts) >= WINDOW:
                break
        texts = texts[:WINDOW]
        lengths = [len(job.features[i].input_ids) for job, i in texts]
        order = np.argsort(lengths, kind="stable")
        runs = self.model.cheapest_runs([lengths[place] for place in order], self.rows)
        place_of_first = int(np.flatnonzero(order == 0)[0])
        start, stop, length = next(run for run in runs if run[0] <= place_of_first < run[1])
        chosen = [texts[place] for place in order[start:stop]]
        for job, i in chosen:
            job.begun = True
            self.done_for[job.address] = self.done_for.get(job.address, 0.0) + job.seconds / len(job.features)
            job.left.remove(i)
            if not job.left:
                self.waiting.remove(job)
        return chosen, length

    def computed(self, chosen, places, future):
        """A batch has been computed: its logits go to the jobs, and the stream gets the next one."""
        self.running -= places
        del self.begun[future]
        try:
            fetched, _, _ = future.result()
            self.metrics.computed([job.features[i] for job, i in chosen])
            for (job, i), row in zip(chosen, fetched["logits"]):
                if job.logits is None:
                    job.logits = np.empty((len(job.features), len(row)), "float32")
                job.logits[i] = row
                job.missing -= 1
                if not job.missing and not job.done.done():
                    job.done.set_result(job.logits)
        except Exception as error:
            self.fail([job for job, _ in chosen], error)
        self.fill()

    async def close(self):
        """Waits until nothing is left to do; ends the thread that tokenizes."""
        while self.untokenized or self.waiting or self.begun:
            await asyncio.sleep(0.05)
        self.tokenizer_task.cancel()
        self.tokenizing.shutdown()

    def is_stuck(self, seconds):
        """Whether the engine hangs, or nothing is tokenized any more."""
        return self.tokenizer_task.done() or self.hangs(seconds)

    def hangs(self, seconds):
        """Whether a batch has been with the streams for longer than that."""
        return any(time.monotonic() - begun > seconds for begun in self.begun.values())

    def fail(self, jobs, error):
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error)

"""Orders to a watched loop (``automode ctl``): it can be asked to stop and given another rate; the rest is refused and recorded."""

from __future__ import annotations

from collections import deque

from automode.errors import AutomodeError, NotExecutableError
from automode.planner.controls import Order, SetArguments, arguments_of
from automode.planner.events import Controlled
from automode.trainer.driver import Driver
from automode.trainer.run_parts import RunParts
from automode.trainer.safeguarding import why_no_rate
from automode.trainer.setting_rates import factor_of, set_rates


class WatchedOrders:
    """Takes orders in, and carries them out between two steps.

    Args:
        parts: The run.
        driver: Its log, and where a wish to stop is kept.
    """

    def __init__(self, parts: RunParts, driver: Driver) -> None:
        self._parts = parts
        self._driver = driver
        self._line: deque[Order] = deque()
        driver.requests.orders_to(self._line.append)

    def __bool__(self) -> bool:
        return bool(self._line)

    def follow(self) -> None:
        """Carry out, or refuse, what has come in."""
        while self._line:
            order = self._line.popleft()
            told, refused = "", None
            try:
                told = self._carry_out(order)
            except AutomodeError as error:
                refused = str(error)[:2000]
            self._parts.console.event(
                f"[step {self._step}] {order.control} by {order.actor}: {told or f'refused: {refused}'}"
            )
            self._driver.requests.answered(order.request)
            self._driver.scribe.feed(
                Controlled(
                    request=order.request,
                    verb=order.control,
                    actor=order.actor,
                    step=self._step,
                    note=order.note,
                    arguments=order.arguments,
                    refused=refused,
                    told=told,
                ),
                effective_at=self._step,
            )
            self._driver.scribe.write()

    @property
    def _step(self) -> int:
        return self._parts.trunk.step

    def _carry_out(self, order: Order) -> str:
        match order.control:
            case "stop":
                self._driver.stop_requested = f"stopped by {order.actor}"
                return "the loop is asked to stop (watch.should_stop); it ends when it looks"
            case "set":
                return self._set(arguments_of("set", order.arguments), order)
            case _:
                raise NotExecutableError(
                    f"{self._parts.hand_written}, and {order.control} needs a loop of ours; it can be asked to stop, to set lr or "
                    "lr_mul, and a card can be handed in (automode submit)"
                )

    def _set(self, asked: SetArguments, order: Order) -> str:
        if asked.max_epochs is not None or asked.max_steps is not None:
            raise NotExecutableError(f"{self._parts.hand_written}, and its length is in your code")
        trunk = self._parts.trunk
        if why := why_no_rate(trunk):
            raise NotExecutableError(why)
        factor = factor_of(asked, trunk)
        assert factor is not None
        rates = set_rates(self._driver, trunk, factor, asked.lr, order)
        return f"learning rate {', '.join(f'{rate:.6g}' for rate in rates)}"

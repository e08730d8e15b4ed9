"""export: a trained run to the stock folder of its method, or a published EDM snapshot; each with a model card."""

from __future__ import annotations

from pathlib import Path

from lightning_t2i.cli import runs
from lightning_t2i.cli.card import RunFacts, write_card, write_edm_card
from lightning_t2i.cli.main import Request
from lightning_t2i.cli.restore import restore
from lightning_t2i.cli.verbs import changes_of, opened
from lightning_t2i.errors import UserError
from lightning_t2i.protocols import Exports


def export(request: Request) -> int:
    """Writes `train.py export OUT --run NAME [--ckpt_path FOLDER] [--ema NAME]`: averaged weights of a checkpoint.

    `train.py export OUT --from-edm FILE` needs no run: it converts a network snapshot of EDM.

    Raises:
        UserError: no folder named, it exists, no checkpoint, a method without an export, or no such snapshot.
    """
    if len(request.positional) != 1:
        raise UserError("export takes one folder", given=request.positional, fix="train.py export OUT --run NAME")
    out = Path(request.positional[0])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("The export folder exists", where="OUT", given=out, fix="name a new folder or remove it")
    if request.from_edm is not None:
        from lightning_t2i.networks.edm_snapshot import LICENCE, convert_snapshot

        convert_snapshot(request.from_edm, out)
        write_edm_card(out, request.from_edm, LICENCE)
        print(f"exported {request.from_edm} to {out}\nlicence of EDM's published weights: {LICENCE}")
        return 0
    if (found := opened(request)) is None:
        return 0
    session, config = found
    folder = runs.runs_root() / runs.run_name(request.run, request.configs)
    session.build(folder, [], [])
    method, data, name = session.method, session.data, type(session.method).__name__
    method.quantizes = False  # a stock folder holds whole weights
    checkpoint, state = restore(method, folder, request.ckpt_path, request.ema)
    if not isinstance(method, Exports):
        raise UserError("This method has nothing to export", where="model.class_path", given=name)
    data.prepare_data()
    data.setup("validate")
    method.export(out, data.val_dataloader())
    sampling = {name: getattr(method, name, None) for name in ("steps", "guidance", "embedded_guidance")}
    if hasattr(method, "val_steps"):  # a student (protocols.Distils): `guidance` is its teacher's
        sampling |= {"steps": sampling["steps"] or 1, "guidance": getattr(method, "alpha", 1.0)}
    changes = changes_of(request, config, folder)
    changes = {key: value for key, value in changes.items() if key.startswith(("--ema", "model."))}
    write_card(out, RunFacts.of(folder, method, state, changes), sampling)
    print(f"exported {checkpoint} to {out}")
    return 0

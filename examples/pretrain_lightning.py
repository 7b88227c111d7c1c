"""Lightning: a converted model inside a LightningModule, with the parameter groups of ssmax for its optimizer."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ssmax


class Classifier(lightning.LightningModule):
    def __init__(self, width=16, length=24):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        # Convert in __init__, so that load_from_checkpoint builds a converted model.
        self.encoder = ssmax.convert(encoder, train_length=length)

    def training_step(self, batch, _):
        x, label = batch
        return nn.functional.cross_entropy(self.head(self.encoder(self.embed(x)).mean(1)), label)

    def configure_optimizers(self):
        return torch.optim.AdamW(ssmax.parameter_groups(self, lr=1e-2, weight_decay=0.1))


torch.manual_seed(0)
x = torch.randn(64, 24, 3)
loader = DataLoader(TensorDataset(x, (x.mean((1, 2)) > 0).long()), batch_size=16)
model = Classifier()
s = model.encoder.layers[0].self_attn.ssmax.s
start = s.detach().clone()
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=".")  # fmt: skip
trainer.fit(model, loader)

decay = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
print("weight decay of s:", decay[id(s)], "- of the head:", decay[id(model.head.weight)], "- s:", s.tolist())
assert decay[id(s)] == 0
assert s.ne(start).all()
trainer.save_checkpoint("classifier.ckpt")
again = Classifier.load_from_checkpoint("classifier.ckpt")
assert again.encoder.layers[0].self_attn.ssmax.s.equal(s)

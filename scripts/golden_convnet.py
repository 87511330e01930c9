"""Golden cases for convolutional networks: weights, images, logits in evaluation and gradients in training, as PyTorch has them.

    /path/to/venv/bin/python scripts/golden_convnet.py

Writes crates/fourfold-models/tests/golden_convnet/<case>/.
"""
import torch
from golden import MODELS, write_json
from safetensors.torch import save_file
from torch import nn

ROOT = MODELS / "golden_convnet"


class Residual(nn.Module):
    """A residual block of torchvision's naming."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        project = stride != 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if project else None
        )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    def config(self, name, stride, project):
        conv = lambda n, **more: {"type": "conv2d", "name": n, "out_channels": self.conv1.out_channels, "bias": False, **more}
        block = {"type": "residual", "name": name, "layers": [
            conv("conv1", kernel_size=3, stride=stride, padding=1), {"type": "batch_norm", "name": "bn1"}, {"type": "relu"},
            conv("conv2", kernel_size=3, padding=1), {"type": "batch_norm", "name": "bn2"}]}
        if project:
            block["shortcut"] = [conv("downsample.0", kernel_size=1, stride=stride), {"type": "batch_norm", "name": "downsample.1"}]
        return [block, {"type": "relu"}]


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8, 8, 1))
        self.layer2 = nn.Sequential(Residual(8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def plain():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 8, (3, 1), (2, 1), (1, 0), groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(2, 1, 1), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 4))
    layers = [
        {"type": "conv2d", "out_channels": 6, "kernel_size": 5, "padding": 2}, {"type": "relu"},
        {"type": "max_pool", "kernel_size": 3, "stride": 2, "padding": 1},
        {"type": "conv2d", "out_channels": 8, "kernel_size": [3, 1], "stride": [2, 1], "padding": [1, 0], "groups": 2},
        {"type": "batch_norm"}, {"type": "relu"}, {"type": "avg_pool", "kernel_size": 2, "stride": 1, "padding": 1},
        {"type": "adaptive_avg_pool", "output_size": [2, 3]}, {"type": "flatten"},
        {"type": "linear", "out_features": 10}, {"type": "relu"}, {"type": "linear", "out_features": 4}]
    return net, layers, (2, 11, 9)


def resnet():
    net = ResNet()
    layers = [{"type": "conv2d", "name": "conv1", "out_channels": 8, "kernel_size": 3, "padding": 1, "bias": False},
              {"type": "batch_norm", "name": "bn1"}, {"type": "relu"}]
    layers += net.layer1[0].config("layer1.0", 1, False) + net.layer2[0].config("layer2.0", 2, True)
    layers += [{"type": "adaptive_avg_pool", "output_size": 1}, {"type": "flatten"},
               {"type": "linear", "name": "fc", "out_features": 5}]
    return net, layers, (3, 8, 10)


for name, make in [("plain", plain), ("resnet", resnet)]:
    torch.manual_seed(1)
    net, layers, image = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    state = {k: v.clone() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    images = torch.randn(6, *image)
    labels = torch.arange(6) % 4
    net.eval()
    logits = net(images).detach()
    net.train()
    loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["ConvNet"], "model_type": "convnet", "image_size": list(image), "layers": layers}
    write_json(folder / "config.json", config)
    golden = {"images": images, "labels": labels, "logits": logits, "loss": loss.detach()[None]}
    golden |= {f"gradient.{k}": p.grad for k, p in net.named_parameters()}
    golden |= {f"after.{k}": v.clone() for k, v in net.state_dict().items() if "running" in k}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
